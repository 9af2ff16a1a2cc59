"""The phantom: NSD's design, responses with known truth, and a difficulty between trivial and hopeless."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from data.encoders.gabor import GaborEncoder
from data.phantom import PRESETS, PhantomConfig, read_truth, truth_path, write_phantom
from data.phantom.cortex import draw_cortex
from data.phantom.design import count_images, draw_trials
from data.phantom.images import CATEGORY_NAMES, Objects, draw_images, render
from data.phantom.responses import (
    content_drive,
    draw_common_tuning,
    draw_population,
    early_drive,
    energy_maps,
)
from data.rois import families
from data.store import PooledStore

SMALL = PhantomConfig(subjects=2, sessions=4, trials_per_session=200, voxels=90)
SMALLEST = PhantomConfig(subjects=1, sessions=1, trials_per_session=40, voxels=24)
N_CONTENT = 14


@pytest.fixture(scope="module")
def phantom_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "small.zarr"
    write_phantom(path, SMALL)
    return path


@pytest.fixture(scope="module")
def store(phantom_path):
    return PooledStore.open(phantom_path)


@pytest.fixture(scope="module")
def truth(phantom_path):
    return read_truth(phantom_path)


@pytest.fixture(scope="module")
def population():
    rng = np.random.default_rng(3)
    common = draw_common_tuning(N_CONTENT, rng=rng)
    return common, draw_population(draw_cortex(600, rng=rng), common, rng=rng)


def standardised_by_session(subject) -> np.ndarray:
    responses, session = subject.responses().astype(np.float64), subject.session
    for index in np.unique(session):
        here = session == index
        responses[here] = (responses[here] - responses[here].mean(0)) / responses[here].std(0)
    return responses


def repeat_means(responses: np.ndarray, shown: np.ndarray, images: np.ndarray) -> np.ndarray:
    return np.stack([responses[shown == image].mean(0) for image in images])


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first - first.mean(0), second - second.mean(0)
    return (first * second).sum(0) / np.sqrt((first**2).sum(0) * (second**2).sum(0))


# -- design ------------------------------------------------------------------------------------------------------------


def test_tiny_and_standard_have_the_promised_size():
    tiny, standard = PRESETS["tiny"], PRESETS["standard"]
    assert (tiny.subjects, tiny.sessions, tiny.trials_per_session, tiny.voxels) == (8, 3, 200, 400)
    assert (standard.subjects, standard.sessions, standard.trials_per_session, standard.voxels) == (8, 10, 200, 1400)
    counts = count_images(n_trials=tiny.n_trials, repeats=tiny.repeats)
    assert (counts.test, counts.validation, counts.test_repeats) == (48, 24, 3)


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
@pytest.mark.parametrize("n_trials", [24, 25, 101, 600, 2000, 30000])
def test_the_design_fills_any_number_of_trials_with_all_roles(n_trials, repeats):
    counts = count_images(n_trials=n_trials, repeats=repeats)
    assert counts.presentations.sum() == n_trials
    assert counts.presentations.min() >= 1
    assert counts.presentations.max() <= repeats
    assert min(counts.test, counts.validation, counts.own) >= 2


def test_repeats_count_up_and_never_follow_immediately():
    counts = count_images(n_trials=600, repeats=3)
    trials = draw_trials(counts, trials_per_session=200, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(trials.image), counts.presentations)
    for image in range(len(counts.presentations)):
        assert trials.repeat[trials.image == image].tolist() == list(range(counts.presentations[image]))
    assert (np.diff(trials.image) != 0).all()
    assert (np.diff(trials.session) >= 0).all()
    assert np.bincount(trials.session)[1:].tolist() == [200, 200, 200]


def test_first_session_brings_new_images_and_later_ones_the_repeats(store):
    roles = np.array(store.image_roles())
    subject = store.subject(1)
    repeat = subject.trial_column("repeat")
    first = subject.session == 1
    assert (repeat[first] == 0).mean() > 0.8
    assert (repeat[subject.session == 4] > 0).mean() > 0.8
    assert set(roles[subject.image[first]]) == {"train", "validation", "test"}


def test_shared_images_are_seen_by_all_and_own_images_by_one(store):
    roles = np.array(store.image_roles())
    seen = [set(store.subject(name).image.tolist()) for name in store.subjects]
    shared = set(np.flatnonzero(roles != "train").tolist())
    assert seen[0] & seen[1] == shared
    for name in store.subjects:
        image = store.subject(name).image
        assert set(np.bincount(image)[np.flatnonzero(roles == "test")]) == {3}


# -- truth -------------------------------------------------------------------------------------------------------------


def test_ncsnr_is_recovered_from_repeats(store, truth):
    for name, known in truth.subjects.items():
        subject = store.subject(name)
        responses = standardised_by_session(subject)
        groups = [responses[subject.image == image] for image in np.unique(subject.image)]
        degrees = sum(len(group) - 1 for group in groups)
        noise = sum(((group - group.mean(0)) ** 2).sum(0) for group in groups) / degrees
        estimate = np.sqrt(np.maximum(1 - noise, 0) / noise)
        assert np.corrcoef(estimate, known.ncsnr)[0, 1] > 0.9
        assert abs(np.mean(estimate - known.ncsnr)) < 0.05


def test_noise_free_signal_reaches_the_ceiling(store, truth):
    roles = np.array(store.image_roles())
    reached, promised = [], []
    for name, known in truth.subjects.items():
        subject = store.subject(name)
        test = known.image[roles[known.image] == "test"]
        measured = repeat_means(standardised_by_session(subject), subject.image, test)
        reached.append(correlations(known.signal[np.isin(known.image, test)], measured))
        promised.append(known.ceiling)
    assert np.mean(reached) == pytest.approx(np.mean(promised), abs=0.05)


def test_signal_is_of_unit_variance_over_the_images_seen(truth):
    for known in truth.subjects.values():
        np.testing.assert_allclose(known.signal.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(known.signal.std(0), 1, atol=1e-5)


def test_ridge_on_gabor_tokens_is_neither_perfect_nor_lost(store, truth):
    roles = np.array(store.image_roles())
    tokens = GaborEncoder().encode(np.concatenate([pixels for _, _, pixels in store.pixels()]))
    pooled = tokens.patch.reshape(len(roles), 4, 4, 2, 4, 2, -1).mean((3, 5))
    features = np.concatenate([tokens.cls.reshape(len(roles), -1), pooled.reshape(len(roles), -1)], axis=1)
    subject, known = store.subject(1), truth.subjects["subj01"]
    train, test = (known.image[roles[known.image] == role] for role in ("train", "test"))
    responses = standardised_by_session(subject)
    mean, deviation = features[train].mean(0), features[train].std(0) + 1e-6
    model = RidgeCV(np.logspace(1, 6, 11), alpha_per_target=True)
    model.fit((features[train] - mean) / deviation, repeat_means(responses, subject.image, train))
    predicted = model.predict((features[test] - mean) / deviation)
    score = correlations(predicted, repeat_means(responses, subject.image, test))
    for family, mask in families(subject).items():
        ratio = score[mask].mean() / known.ceiling[mask].mean()
        assert 0.3 < ratio < 0.8, f"{family}: {ratio:.2f} of the ceiling"


def test_labels_are_those_of_the_pictures(store, truth):
    assert len(truth.labels.scene) == store.n_images
    fruit = truth.labels.category_names.index("fruit")
    objects = truth.labels.objects
    shown = np.flatnonzero((objects.category == fruit) & (truth.labels.visible_area > 0.03))
    other = np.setdiff1d(np.arange(store.n_images), objects.image[shown])
    pixels = np.concatenate([block for _, _, block in store.pixels()]).astype(np.float64)
    orange = (pixels[..., 0] - pixels[..., 2] > 90).mean((1, 2))
    assert orange[objects.image[shown]].mean() > 3 * orange[other].mean()
    assert (truth.labels.visible_area <= 4 * objects.size**2 + 0.01).all()


# -- cortex ------------------------------------------------------------------------------------------------------------


def test_every_family_and_every_area_has_voxels(store):
    for name in store.subjects:
        subject = store.subject(name)
        assert set(families(subject)) == {"early", "mid", "higher"}
        for family in ("prf-visualrois", "streams"):
            rois = subject.rois[family]
            assert set(rois.names) <= set(np.unique(rois.labels).tolist())


def test_neighbours_on_cortex_see_neighbouring_places():
    cortex = draw_cortex(800, rng=np.random.default_rng(0))
    early = cortex.hierarchy < 0.4
    place, field = cortex.coordinates[early], cortex.receptive_field[early, :2]
    apart_mm = np.linalg.norm(place[:, None] - place, axis=-1)
    apart = np.linalg.norm(field[:, None] - field, axis=-1)
    near = (apart_mm > 0) & (apart_mm < 2.5)
    assert np.median(apart[near]) < 0.4 * np.median(apart[apart_mm > 0])


def test_hemispheres_see_the_opposite_side_and_ventral_v1_the_upper_half():
    cortex = draw_cortex(800, rng=np.random.default_rng(0))
    x, y, _ = cortex.receptive_field.T
    v1 = cortex.retinotopic.mask("V1v", "V1d")
    assert (x[v1 & (cortex.coordinates[:, 0] < 0)] > 0.48).all()
    assert (x[v1 & (cortex.coordinates[:, 0] > 0)] < 0.52).all()
    assert (y[cortex.retinotopic.mask("V1v")] < 0.52).all()
    assert (y[cortex.retinotopic.mask("V1d")] > 0.48).all()


def test_receptive_fields_grow_with_eccentricity_and_hierarchy():
    cortex = draw_cortex(800, rng=np.random.default_rng(0))
    size, eccentricity = cortex.receptive_field[:, 2], cortex.sheet[:, 2]
    v1 = cortex.hierarchy < 0.14
    assert np.corrcoef(size[v1], eccentricity[v1])[0, 1] > 0.7
    by_level = [
        np.median(size[(cortex.hierarchy >= a) & (cortex.hierarchy < a + 0.2)]) for a in (0, 0.2, 0.4, 0.6, 0.8)
    ]
    assert by_level == sorted(by_level)


# -- responses ---------------------------------------------------------------------------------------------------------


def test_early_voxels_do_not_see_the_phase(population):
    common, voxels = population
    x = np.arange(128) / 128
    phases = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    gratings = [np.rint(127 + 60 * np.cos(2 * np.pi * 12 * x + phase)) for phase in phases]
    pixels = np.stack([np.broadcast_to(row[None, :, None], (128, 128, 3)) for row in gratings]).astype(np.uint8)
    drive = early_drive(energy_maps(pixels, common), voxels)
    pictures = draw_images(40, rng=np.random.default_rng(0))[0]
    among_pictures = early_drive(energy_maps(pictures, common), voxels).std(0)
    assert np.median(drive.std(0) / among_pictures) < 0.05


def test_a_moved_object_loses_early_voxels_and_keeps_higher_ones(population):
    common, voxels = population
    n = len(CATEGORY_NAMES)
    drives = []
    for place in (-5.0, 0.4, 0.6):  # out of sight, here, there: one seed paints the same grounds and objects
        objects = Objects(
            image=np.arange(n),
            category=np.arange(n),
            x=np.full(n, place),
            y=np.full(n, place),
            size=np.full(n, 0.12),
        )
        pixels, labels = render(np.zeros(n, np.int64), objects, rng=np.random.default_rng(0))
        drives.append((early_drive(energy_maps(pixels, common), voxels), content_drive(labels, voxels)))
    early, content = (np.stack(drive) for drive in zip(*drives, strict=True))

    def kept(drive, where):
        """Change by the object there over its change here, in those voxels that it changed most here."""
        here, there = (np.linalg.norm(drive[k] - drive[0], axis=0)[where] for k in (1, 2))
        most = here >= np.quantile(here, 0.8)
        return np.median(there[most] / here[most])

    assert kept(early, voxels.cortex.hierarchy < 0.14) < 0.3
    assert kept(content, voxels.cortex.hierarchy > 0.7) > 0.8
    wide = (voxels.cortex.hierarchy > 0.7) & (voxels.cortex.receptive_field[:, 2] > 0.2)
    assert np.median(correlations(content[1][:, wide], content[2][:, wide])) > 0.9


def test_content_grows_with_the_hierarchy_from_none_in_v3(population):
    _, voxels = population
    hierarchy, share = voxels.cortex.hierarchy, voxels.content_share
    assert (share[hierarchy < 0.36] == 0).all()
    assert (share[hierarchy > 0.72] == 1).all()
    assert (np.diff(share[np.argsort(hierarchy)]) >= 0).all()


def test_subjects_mix_one_tuning_space_each_anew(truth):
    first, second = (known.content for known in truth.subjects.values())
    _, strength, axes = np.linalg.svd(first)
    space = axes[:8]
    assert strength[8] < 1e-9 * strength[0]
    np.testing.assert_allclose(second @ space.T @ space, second, atol=1e-9)
    of_voxels = np.abs(np.sum(first * second, 1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1))
    assert of_voxels.mean() < 0.5


# -- files -------------------------------------------------------------------------------------------------------------


def test_without_specialisation_only_the_labels_move_and_areas_are_alike(phantom_path, store, truth, tmp_path):
    path = tmp_path / "alike.zarr"
    write_phantom(path, dataclasses.replace(SMALL, specialised=False))
    alike = PooledStore.open(path)
    for number in (1, 2):
        planted, dealt = store.subject(number), alike.subject(number)
        np.testing.assert_array_equal(planted.responses(), dealt.responses())
        for name, rois in planted.rois.items():
            assert sorted(dealt.rois[name].labels) == sorted(rois.labels)
            assert (dealt.rois[name].labels != rois.labels).any()
        pairs = [set(zip(*(s.rois[name].labels for name in planted.rois), strict=True)) for s in (planted, dealt)]
        assert pairs[0] == pairs[1]  # a voxel takes all its labels from one voxel
        share = truth.subjects[planted.name].content_share
        early, higher = (share[families(dealt)[name]].mean() for name in ("early", "higher"))
        assert abs(early - higher) < 0.25  # chance of 36 voxels each; planted, it is near 1
        assert share[families(planted)["higher"]].mean() - share[families(planted)["early"]].mean() > 0.7


def test_one_seed_gives_one_phantom_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_phantom(
            tmp_path / f"{name}.zarr", PhantomConfig(sessions=1, trials_per_session=30, subjects=1, seed=seed)
        )
    first, again, other = (PooledStore.open(tmp_path / f"{name}.zarr").subject(1).digest for name in "abc")
    assert first == again
    assert first != other


def test_a_subject_does_not_depend_on_how_many_there_are(phantom_path, tmp_path):
    alone = tmp_path / "alone.zarr"
    sizes = {"sessions": SMALL.sessions, "trials_per_session": SMALL.trials_per_session, "voxels": SMALL.voxels}
    write_phantom(alone, PhantomConfig(subjects=1, **sizes))
    assert PooledStore.open(alone).subject(1).digest == PooledStore.open(phantom_path).subject(1).digest


def test_nothing_is_overwritten(phantom_path):
    with pytest.raises(ValueError, match="exists already"):
        write_phantom(phantom_path, SMALLEST)


def test_truth_alone_blocks_the_name_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("data.phantom.simulate.write_truth", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom(tmp_path / "p.zarr", SMALLEST)
    assert list(tmp_path.iterdir()) == []
    truth_path(tmp_path / "p.zarr").mkdir()
    with pytest.raises(ValueError, match=r"p\.truth\.zarr exists already"):
        write_phantom(tmp_path / "p.zarr", SMALLEST)


def test_a_store_without_truth_is_named(tmp_path):
    with pytest.raises(ValueError, match="only phantoms have one"):
        read_truth(tmp_path / "measured.zarr")


def test_a_url_is_refused():
    with pytest.raises(ValueError, match="local path"):
        write_phantom("s3://bucket/phantom.zarr", SMALLEST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": 0}, "subjects is 0; it must be at least 1"),
        ({"sessions": 0}, "sessions is 0"),
        ({"trials_per_session": 7}, "trials_per_session is 7"),
        ({"voxels": 19}, "voxels is 19"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"sessions": 2, "trials_per_session": 10}, "20 trials a subject are too few"),
        ({"sessions": 1, "trials_per_session": 30, "repeats": 14}, "lower the repeats or add trials"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_options_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        PhantomConfig(**options)
