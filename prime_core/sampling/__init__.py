"""How a model speaks: what is known, when each digit is revealed, how its token is drawn, and what is made of it."""
