"""Control images for the ControlNet: what a filter makes of a picture before it guides the prior."""
