"""The subcommands of `hf-vq`, a file each: what it takes, and what it does."""
