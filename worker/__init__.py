"""The doers: the dispatcher rings, the workers claim units and run them."""
