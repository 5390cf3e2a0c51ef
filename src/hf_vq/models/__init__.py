"""The models as they travel to the Hub: one flat folder, so that remote code can be copied file by file."""
