"""The optimizers of a run: AdamW, or Muon for linear maps and convolutions with AdamW for all else."""

from typing import Any

import torch
from torch import nn

from engine_contract import EngineArguments

LINEAR = nn.Linear, nn.Conv2d


def build_optimizer(module: nn.Module, args: EngineArguments) -> torch.optim.Optimizer:
    """What `args.optim` names, over all that is trained; biases, gains and the like do not decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decaying, bare = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    betas = (args.adam_beta1, args.adam_beta2)
    adam: dict[str, Any] = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
    decay, no_decay = {"weight_decay": args.weight_decay}, {"weight_decay": 0.0}
    if args.optim == "adamw_torch_fused":
        return torch.optim.AdamW([{"params": decaying, **decay}, {"params": bare, **no_decay}], fused=True, **adam)

    from pytorch_optimizer import Muon

    # What gives the scores is better left to Adam: the rows of rare codes are not to move as far as the others.
    hidden = [part for name, part in module.named_modules() if not name.startswith("head.")]
    orthogonal = {id(part.weight) for part in hidden if isinstance(part, LINEAR)}
    groups = [
        {"params": [p for p in decaying if id(p) in orthogonal], "use_muon": True, "lr": args.learning_rate, **decay},
        {"params": [p for p in decaying if id(p) not in orthogonal], "use_muon": False, **adam, **decay},
        {"params": bare, "use_muon": False, **adam, **no_decay},
    ]
    # Its steps are scaled to the size of Adam's, so that one learning rate serves both (arXiv 2502.16982, 2.2).
    return Muon([group for group in groups if group["params"]], use_adjusted_lr=True)
