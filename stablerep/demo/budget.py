"""How much the demo does: all of its knobs, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Sizes of the demo's steps.

    Args:
        num_captions: Captions from the grammar.
        num_images_per_caption: Images generated of each caption, >= num_views_per_caption.
        num_inference_steps: Denoising steps of an image.
        guidance_scale: Weight of classifier-free guidance.
        dtype: Precision of the generator.
        label_by: The attribute of a rendered image that is its label.
        num_train_scenes: Rendered images, with labels, on which probe and k-NN are fitted.
        num_test_scenes: Rendered images on which they are tested; the interval shrinks with its root.
        num_steps: Optimizer steps of each of the two trainings.
        num_warmup_steps: Steps of the learning rate's warm-up.
        num_captions_per_step: Captions in a step of StableRep.
        num_views_per_caption: Images of each of them. SimCLR sees as many crops a step: two of one image of
            each of num_captions_per_step · num_views_per_caption / 2 captions.
        num_steps_between_knn: Steps between two points of the k-NN curves.
        fit_options: Further options of both trainings, as on the command line.
        num_probe_epochs: Epochs of the linear probe.
        num_probe_views: Augmented views of each training image that the probe sees in turn.
    """

    num_captions: int
    num_images_per_caption: int
    num_inference_steps: int
    guidance_scale: float
    dtype: str
    label_by: str
    num_train_scenes: int
    num_test_scenes: int
    num_steps: int
    num_warmup_steps: int
    num_captions_per_step: int
    num_views_per_caption: int
    num_steps_between_knn: int
    fit_options: tuple[str, ...]
    num_probe_epochs: int
    num_probe_views: int

    def __post_init__(self) -> None:
        for name, bound in [
            ("num_images_per_caption", self.num_views_per_caption),
            ("num_captions", self.num_captions_per_simclr_step),
            ("num_steps", 1),
        ]:
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"{name} of the demo must be >= {bound}, got {value}")

    @property
    def num_images(self) -> int:
        """Images that are generated."""
        return self.num_captions * self.num_images_per_caption

    @property
    def num_images_per_step(self) -> int:
        """Images in a step of either training."""
        return self.num_captions_per_step * self.num_views_per_caption

    @property
    def num_captions_per_simclr_step(self) -> int:
        """Captions of which a step of SimCLR crops one image twice."""
        return self.num_images_per_step // 2


FULL = Budget(
    # Sampling is the largest cost, about 0.13 s an image on two cores: three and a half minutes of it.
    num_captions=400,
    num_images_per_caption=4,
    # The shipped sampler's images no longer change visibly beyond it.
    num_inference_steps=16,
    # The published value: more of it makes the images of a caption alike.
    guidance_scale=2.0,
    # As the trainings; faster than float32 on processors that know it.
    dtype="bfloat16",
    # In minutes, a vision transformer without convolutions learns colours, not yet shapes.
    label_by="colour",
    num_train_scenes=2000,
    # 1,000 images give intervals of about three points to either side.
    num_test_scenes=1000,
    # About two minutes for each training.
    num_steps=150,
    num_warmup_steps=15,
    num_captions_per_step=64,
    num_views_per_caption=4,
    num_steps_between_knn=25,
    fit_options=(),
    num_probe_epochs=40,
    num_probe_views=4,
)
"""At most ten minutes on two cores."""

QUICK = Budget(
    num_captions=128,
    num_images_per_caption=2,
    # Half of the full budget's: coarser images, which is enough to see that everything runs.
    num_inference_steps=8,
    guidance_scale=2.0,
    dtype="bfloat16",
    label_by="colour",
    num_train_scenes=600,
    # Intervals of about five points: the verdict may well be that nothing can be told apart.
    num_test_scenes=300,
    num_steps=12,
    num_warmup_steps=2,
    num_captions_per_step=64,
    num_views_per_caption=2,
    num_steps_between_knn=4,
    fit_options=(),
    num_probe_epochs=10,
    num_probe_views=1,
)
"""Under two minutes on two cores: that every step runs, not that the claim holds."""
