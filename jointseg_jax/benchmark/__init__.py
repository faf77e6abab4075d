"""How fast the parts of a config run on this machine, measured."""
