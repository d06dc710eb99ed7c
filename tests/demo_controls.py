"""What the page of the demo sends with a message."""

SHORT = {"max_new_tokens": 8}


def controls(models, **changes):
    """The arguments of `Talk.say` behind the message, as the page would send them."""
    model, prompt, scan = models.default
    sampling = dict(max_new_tokens=8, temperature=0, top_p=1, top_k=0, seed=None)
    penalties = dict(presence_penalty=0, frequency_penalty=0, penalty_decay=0.996)
    values = dict(language="en", model=model, prompt=prompt, scan=scan, look_again=False)
    return values | sampling | penalties | dict(stop="") | changes
