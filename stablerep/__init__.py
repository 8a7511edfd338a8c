"""StableRep: visual representations learnt from the images that a diffusion model makes of captions.

Reference: Tian et al., "StableRep: Synthetic Images from Text-to-Image Models Make Strong Visual
Representation Learners", NeurIPS 2023, https://arxiv.org/abs/2306.00984
"""

__version__ = "0.1.0"
