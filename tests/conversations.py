"""What the tests of conversations share."""

import torch

SHORT = {"max_new_tokens": 12}
QUESTIONS = ["What is the colour?", "What?", "What is it, 在哪里?", "How many objects do you see in the picture?"]


def same(one, other):
    """Whether two sessions remember exactly the same."""
    a, b = one._now, other._now
    if (a.turns, a.unread, a.state is None) != (b.turns, b.unread, b.state is None):
        return False
    tensors = [(x, y) for p, q in zip(a.state.layers, b.state.layers, strict=True) for x, y in zip(p, q, strict=True)]
    return a.state.seen == b.state.seen and all(torch.equal(x, y) for x, y in tensors)
