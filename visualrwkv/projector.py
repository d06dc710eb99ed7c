"""From the width of the vision tower to the width of the language model."""

from torch import nn

from visualrwkv.ops.linear import Linear


def build_projector(kind: str, vision_size: int, hidden_size: int) -> nn.Module:
    """(…, vision_size) -> (…, hidden_size). `linear` has the released checkpoints' single matrix (`proj.weight`);
    `mlp` normalises first, because features before the tower's final norm have no fixed scale."""
    if kind == "linear":
        return Linear(vision_size, hidden_size, bias=False)
    return nn.Sequential(
        nn.LayerNorm(vision_size),
        Linear(vision_size, hidden_size),
        nn.GELU(),
        Linear(hidden_size, hidden_size, bias=False),
    )
