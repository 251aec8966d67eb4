"The clips that methods are judged on: what they promise, and what a wrong folder or list gets to hear."

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tokenflow_nb.compare.data import Pair, davis, load_pairs, toy_benchmark
from tokenflow_nb.measure.evaluate import evaluate
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import MATERIALS, Scene, held_out

DAVIS_2017 = {
    "train": "bear bmx-bumps boat boxing-fisheye breakdance-flare bus car-turn cat-girl classic-car color-run crossing dance-jump dancing "
    "disc-jockey dog-agility dog-gooses dogs-scale drift-turn drone elephant flamingo hike hockey horsejump-low kid-football kite-walk koala "
    "lady-running lindy-hop longboard lucia mallard-fly mallard-water miami-surf motocross-bumps motorbike night-race paragliding planes-water "
    "rallye rhino rollerblade schoolgirls scooter-board scooter-gray sheep skate-park snowboard soccerball stroller stunt surf swing tennis "
    "tractor-sand train tuk-tuk upside-down varanus-cage walking",
    "val": "bike-packing blackswan bmx-trees breakdance camel car-roundabout car-shadow cows dance-twirl dog dogs-jump drift-chicane "
    "drift-straight goat gold-fish horsejump-high india judo kite-surf lab-coat libby loading mbike-trick motocross-jump paragliding-launch "
    "parkour pigs scooter-black shooting soapbox",
}


# The toy benchmark


@pytest.fixture(scope="module")
def benchmark():
    return toy_benchmark(12, 2, frames=2, size=32)


def test_no_training_saw_the_scenes_nor_where_it_can_be_what_is_asked_for(benchmark):
    assert len(benchmark) == 24 and len({case.name for case in benchmark}) == 24 == len({(case.source_prompt, case.prompt) for case in benchmark})
    for first, second in zip(benchmark[::2], benchmark[1::2]):
        wanted = first.scene
        assert first.source_prompt == second.source_prompt and (first.source.frames == second.source.frames).all()
        candidates = [scene for name in MATERIALS if (scene := wanted.replace(material=name)).caption != first.source_prompt]
        never_seen = [scene.caption for scene in candidates if held_out(scene.shape, scene.material, scene.background)]
        source = next(name for name in MATERIALS if wanted.replace(material=name).caption == first.source_prompt)
        assert held_out(wanted.shape, source, wanted.background)
        assert {first.prompt, second.prompt} & set(never_seen) == ({first.prompt, second.prompt} if len(never_seen) > 1 else {*never_seen})
        assert first.prompt in never_seen


def test_no_material_is_asked_for_much_more_than_others(benchmark):
    counts = Counter(case.scene.material for case in benchmark)
    assert len(counts) >= 9 and max(counts.values()) <= 5
    assert len({case.scene.shape for case in benchmark}) >= 4 and len({case.scene.background for case in benchmark}) >= 5


def test_the_benchmark_is_the_same_every_time_and_another_by_another_seed(benchmark):
    again = toy_benchmark(5, 2, frames=2, size=32)
    assert [case.name for case in again] == [case.name for case in benchmark[:10]]
    assert all((one.source.frames == other.source.frames).all() and (one.ideal.frames == other.ideal.frames).all() for one, other in zip(again, benchmark))
    assert [case.name for case in toy_benchmark(5, 2, seed=1, frames=2, size=32)] != [case.name for case in again]


@pytest.mark.parametrize(("options", "words"), [(dict(n=0), "n=0"), (dict(prompts=11), "fewer"), (dict(n=99), "another seed"), (dict(frames=2.5), "frames=2.5")])
def test_what_no_benchmark_can_be(options, words):
    with pytest.raises(ValueError, match=words):
        toy_benchmark(**options)


# The list of edits


def test_61_edits_over_clips_that_davis_has():
    pairs, known = load_pairs(), {name for names in DAVIS_2017.values() for name in names.split()}
    assert len(known) == 90 and len(pairs) == 61 == len({(pair.id, pair.prompt) for pair in pairs})
    assert {pair.id for pair in pairs} <= known
    shown = {}
    for pair in pairs:  # a clip shows one thing, whatever is asked
        assert shown.setdefault(pair.id, pair.source_prompt) == pair.source_prompt
    for names in DAVIS_2017.values():
        assert sum(pair.id in names.split() for pair in pairs) >= 25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- id: bear\n  source_prompt: a\n  prompt: b\n- id: dog\n  prompt: b\n", "line 4, entry 2: 'source_prompt' is missing"),
        ("- id: bear\n  source_prompt: a\n  prompt: b\n  style: c\n", "line 1, entry 1: 'style' is unknown"),
        ("- id: 7\n  source_prompt: a\n  prompt: b\n", "id: 7 is no text"),
        ("- id: bear\n  source_prompt: a\n  prompt: ''\n", "prompt: '' is no text"),
        ("- id: bear\n  source_prompt: a\n  prompt: a\n", "asks for no edit"),
        ("- {id: bear, source_prompt: a, prompt: b}\n# again\n- {id: bear, source_prompt: c, prompt: b}\n", "line 3, entry 2: 'bear' .* entry 1 again"),
        ("- bear\n", "line 1, entry 1: 'bear' is no entry"),
        ("bear: a\n", "holds dict: give a list"),
        ("", "holds NoneType"),
        ("- id: bear\n source: [\n", "is not YAML.*line 2"),
    ],
)
def test_a_mistake_in_a_list_is_told_with_its_place(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)mine.yaml.*{words}"):
        load_pairs(tmp_path / "mine.yaml")


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_pairs(tmp_path / "mine.yaml")


# DAVIS


def make_davis(root, ids=("bear", "camel"), frames=5, size=64, quality="480p", masks=True):
    "A folder of DAVIS' layout with toy clips, and their masks as indexed pictures of two objects."
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n".join(ids) + "\n")
    for seed, name in enumerate(ids):
        scene = Scene.random(seed)
        clip, truth = scene.render(frames, size), scene.truth(frames, size)
        pictures, marks = (root / kind / quality / name for kind in ("JPEGImages", "Annotations"))
        for folder in (pictures, marks)[: 1 + masks]:
            folder.mkdir(parents=True)
        for number in range(frames):
            Image.fromarray(clip[number]).save(pictures / f"{number:05d}.jpg", quality=95)
            if masks:
                objects = truth.object_mask[number] * (1 + (np.arange(size) > size // 2))  # the left half is object 1, the right half 2
                indexed = Image.fromarray(objects.astype(np.uint8), "L").convert("P")
                indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
                indexed.save(marks / f"{number:05d}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_davis(tmp_path / "DAVIS")


def test_a_davis_folder_is_read_and_evaluated(folder, tmp_path):
    cases = davis(folder, resolution=(40, 56))
    assert cases.names == [f"{pair.id} → {pair.prompt}" for pair in load_pairs() if pair.id in ("bear", "camel")]
    assert [case.name for case in cases] == cases.names and len(cases) == 4
    case = cases[2]
    assert case.source.frames.shape == (5, 40, 56, 3) and case.source.fps == 24 and case.source_prompt.startswith("a brown bear")
    report = evaluate([case.source for case in cases], cases, metrics=["warp_error", "ssim", "background_psnr"], store=Store(tmp_path / "store"))
    assert not report.errors and len(report.values("warp_error", "edited")) == 4 and "DIS" in report.card["flow"]
    assert report.summary("ssim")["edited"].value == pytest.approx(1) and report.summary("background_psnr")["edited"].value == 99
    assert len(Store(tmp_path / "store").entries()) == 2  # flow of two clips


def test_masks_are_the_union_of_objects_and_lie_on_their_frames(folder):
    "Shrunk twofold and cropped as the frames are: against the mask of the scene at that size."
    cases, truth = davis(folder, split=["bear"], resolution=(32, 32)), Scene.random(0).truth(5, 32).object_mask
    assert (cases[0].mask != truth).mean() < 0.02 and cases[0].mask.dtype == bool
    shown = Scene.random(0).render(5, 32).frames.astype(float)
    assert np.abs(cases[0].source.frames - shown).mean() < 6
    wide = davis(folder, split=["bear"], resolution=(32, 64))[0]  # covers: scaled to 64×64, 16 rows cut away on either side
    assert (wide.mask == Scene.random(0).truth(5, 64).object_mask[:, 16:48]).all()


def test_masks_of_one_object_and_full_resolution(tmp_path):
    root = make_davis(tmp_path / "DAVIS", ("bear",), quality="Full-Resolution")
    for path in (root / "Annotations").rglob("*.png"):  # DAVIS 2016 has black and white instead of numbers
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    assert (davis(root, resolution=(64, 64))[0].mask == Scene.random(0).truth(5, 64).object_mask).all()


def test_nothing_is_read_before_it_is_asked_for(folder):
    cases = davis(folder, resolution=(32, 32), max_frames=3)
    for path in (folder / "JPEGImages" / "480p" / "camel").iterdir():
        path.write_bytes(b"broken")
    rest = cases[2:]
    assert len(rest) == 2 and len(rest.names) == 2 and len(rest[0].source) == 3 and rest[-1].mask.shape == (3, 32, 32)
    with pytest.raises(ValueError, match="00000.jpg is not a picture"):
        cases[0]
    with pytest.raises(IndexError):
        cases[4]


def test_clips_without_masks_are_cases_without_masks(tmp_path):
    cases = davis(make_davis(tmp_path / "DAVIS", ("bear",), masks=False), resolution=(32, 32))
    assert cases[0].mask is None
    report = evaluate([case.source for case in cases], cases, metrics=["ssim", "background_psnr"])
    assert len(report.values("ssim", "edited")) == 2 and len(report.errors) == 2 and "needs mask" in report.errors[0]


def test_pairs_of_ones_own(folder, tmp_path):
    mine = [Pair("camel", "a camel", "a horse")]
    (tmp_path / "mine.yaml").write_text("- {id: camel, source_prompt: a camel, prompt: a horse}\n")
    for pairs in (mine, tmp_path / "mine.yaml"):
        assert davis(folder, pairs=pairs).names == ["camel → a horse"]


def drop(*parts):
    def change(root):
        path = root.joinpath(*parts)
        path.unlink() if path.is_file() else path.rename(root / "away")

    return change


def resized(*parts):
    return lambda root: Image.open(root.joinpath(*parts)).resize((50, 40)).save(root.joinpath(*parts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: root.rename(root.parent / "other"), "no such folder.*JPEGImages/480p/bear/00000.jpg.*davischallenge.org"),
        (drop("JPEGImages"), "expected JPEGImages/480p in it, found in DAVIS: Annotations, ImageSets, away"),
        (drop("JPEGImages", "480p"), "found in JPEGImages: nothing"),
        (drop("ImageSets", "2017", "val.txt"), "expected the list .*val.txt"),
        (drop("JPEGImages", "480p", "camel"), "expected .*camel, found in 480p: bear; 1 of the clips"),
    ],
)
def test_a_wrong_layout_is_told_at_once_with_what_was_expected_and_found(folder, change, words):
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        davis(folder)


def test_the_folder_above_is_a_common_mistake(folder):
    with pytest.raises(ValueError, match=r"found in .*: DAVIS\. Did you mean '.*DAVIS'"):
        davis(folder.parent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("JPEGImages", "480p", "camel", "00002.jpg"), "camel: expected 00002.jpg, found 00003.jpg"),
        (drop("Annotations", "480p", "camel", "00004.png"), "4 masks for 5 frames"),
        (resized("JPEGImages", "480p", "camel", "00003.jpg"), "00003.jpg has 40×50 pixels, the frames before 64×64"),
        (resized("Annotations", "480p", "camel", "00001.png"), "00001.png has 40×50 pixels, its frame 64×64"),
        (lambda root: [path.unlink() for path in (root / "JPEGImages/480p/camel").iterdir()], "expected 00000.jpg, 00001.jpg, ..., found nothing"),
    ],
)
def test_a_broken_clip_is_told_and_costs_no_other(folder, change, words):
    change(folder)
    cases = davis(folder, resolution=(32, 32))
    with pytest.raises(ValueError, match=words):
        cases[0]
    assert cases[-1].mask.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(split="test"), "split='test' is unknown: give 'val' or 'train'"),
        (dict(split="train"), "expected the list .*train.txt"),
        (dict(split=["camel", "hippo"]), "no pair asks for hippo"),
        (dict(pairs=[Pair("dog", "a dog", "a wolf")]), "no pair asks for any of its clips"),
        (dict(resolution=(100, 100)), "multiples of 8"),
        (dict(resolution=512), "give height and width"),
        (dict(max_frames=0), "max_frames=0"),
    ],
)
def test_arguments_that_fit_nothing(folder, options, words):
    with pytest.raises(ValueError, match=words):
        davis(folder, **options)
