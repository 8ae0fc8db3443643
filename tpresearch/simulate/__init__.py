"""A step of the real code on fake ranks, priced: will it fit, how fast will it be, which plan to pick."""
