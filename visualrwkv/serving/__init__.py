"""`visualrwkv serve`: an OpenAI-style endpoint.

`requests.py` reads a request, `engine.py` answers all of them together, `app.py` speaks HTTP.
"""
