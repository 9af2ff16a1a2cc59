"""Who sees which image when: an experiment of NSD's design at any size.

Every subject sees all shared images (test, `repeats` times; validation, twice) and train images of their own (twice).
The presentations of an image are spread over the whole experiment, with some chance of coming close together, so that
the first session holds mostly new images, shared ones among them, and later sessions bring the repeats.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int8, Int16

_SMALLEST_EXPERIMENT = 24
_TRIALS_PER_RUN = 62.5
_NSD_TEST, _NSD_VALIDATION = 515, 485


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """How many images of each role one subject sees, and how often."""

    test: int
    validation: int
    own: int
    test_repeats: int
    validation_repeats: int
    n_trials: int

    @property
    def shared(self) -> int:
        """Images that every subject sees."""
        return self.test + self.validation

    @property
    def presentations(self) -> Int[np.ndarray, " image"]:
        """How often each image is shown: test, validation, own, some of these once more to fill the trials."""
        left = self.n_trials - self.test * self.test_repeats - self.validation * self.validation_repeats
        own = np.full(self.own, left // self.own)
        own[: left % self.own] += 1
        repeats = [np.full(self.test, self.test_repeats), np.full(self.validation, self.validation_repeats), own]
        return np.concatenate(repeats)


@dataclass(frozen=True, kw_only=True)
class TrialTable:
    """One subject's trials in the order of scanning; `image` counts the subject's images: test, validation, own."""

    image: Int[np.ndarray, " trial"]
    session: Int16[np.ndarray, " trial"]
    run: Int16[np.ndarray, " trial"]
    repeat: Int8[np.ndarray, " trial"]


def count_images(*, n_trials: int, repeats: int, n_available: int | None = None) -> ImageCounts:
    """Divide the trials of one subject among images.

    Parameters
    ----------
    n_trials : trials of one subject over all sessions.
    repeats : presentations of a test image, and the most that any image gets.
    n_available : size of the stock of images, None for an endless one. Where it is too small for own images seen twice,
        they are fewer and seen more often.

    Raises
    ------
    ValueError
        If the trials don't suffice for all three roles, or the images don't suffice for the trials.
    """
    if n_trials < _SMALLEST_EXPERIMENT:
        raise ValueError(
            f"{n_trials} trials a subject are too few for test, validation and train images; "
            f"sessions times trials per session must be at least {_SMALLEST_EXPERIMENT}"
        )
    twice = min(2, repeats)
    # A quarter of a small experiment tests; the share falls as the experiment grows, as in NSD.
    test = min(_NSD_TEST, max(2, round(0.24 * n_trials * (n_trials / 600) ** -0.24 / repeats)))
    validation = min(_NSD_VALIDATION, max(2, round(0.08 * n_trials / twice)))
    left = n_trials - test * repeats - validation * twice
    if left < 2 * twice:
        raise ValueError(
            f"{repeats} repeats of {test} test images leave {max(left, 0)} of {n_trials} trials for train images; "
            "lower the repeats or add trials"
        )
    own = -(-left // twice)
    if n_available is not None:
        own = min(own, n_available - test - validation)
        needed = test + validation + -(-left // repeats)
        if n_available < needed:
            raise ValueError(
                f"{n_available} images are too few for {n_trials} trials of at most {repeats} repeats; "
                f"give at least {needed} images, fewer trials or more repeats"
            )
    return ImageCounts(
        test=test, validation=validation, own=own, test_repeats=repeats, validation_repeats=twice, n_trials=n_trials
    )


def draw_trials(counts: ImageCounts, *, trials_per_session: int, rng: np.random.Generator) -> TrialTable:
    """Put the presentations in order and cut them into sessions, and sessions into runs of about 62 trials."""
    presentations = counts.presentations
    image = np.repeat(np.arange(len(presentations)), presentations)
    n_of_image = presentations[image]
    ordinal = np.arange(len(image)) - np.repeat(np.cumsum(presentations) - presentations, presentations)
    # One presentation in each 1/n of the experiment, give or take a quarter of that.
    when = (ordinal + rng.uniform(-0.25, 1.25, len(image))) / n_of_image
    image = _without_immediate_repeats(image[np.argsort(when, kind="stable")])

    position = np.arange(len(image))
    runs = max(1, round(trials_per_session / _TRIALS_PER_RUN))
    within = position % trials_per_session
    order = np.argsort(image, kind="stable")
    repeat = np.empty(len(image), np.int8)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(image[order])) + 1])
    repeat[order] = position - np.repeat(starts, np.diff([*starts, len(image)]))
    return TrialTable(
        image=image,
        session=(position // trials_per_session + 1).astype(np.int16),
        run=(within * runs // trials_per_session + 1).astype(np.int16),
        repeat=repeat,
    )


def _without_immediate_repeats(image: Int[np.ndarray, " trial"]) -> Int[np.ndarray, " trial"]:
    """Exchange the second of two equal neighbours with a later trial."""
    image = image.copy()
    for place in np.flatnonzero(np.diff(image) == 0) + 1:
        other = (place + 2) % len(image)
        image[place], image[other] = image[other], image[place]
    return image
