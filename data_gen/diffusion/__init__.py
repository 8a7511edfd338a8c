"""From captions to images: a diffusers pipeline, and what makes each image a function of its key."""
