"""Every form of a picture and of a mask is the same picture and the same mask."""

import numpy as np
import PIL.Image
import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.pipelines.in_painting import masks, pictures
from tests.var import tiny

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREYS = RANDOM.integers(0, 256, (16, 16), dtype=np.uint8)
HOLE = np.zeros((16, 16), dtype=bool)
HOLE[3:12, 5:16] = True
RGB, GREY, MASK = PIL.Image.fromarray(COLOURS), PIL.Image.fromarray(GREYS), PIL.Image.fromarray(HOLE)


def shares(levels: np.ndarray, dtype: type) -> np.ndarray:
    return (levels / 255).astype(dtype)


def tensor(array: np.ndarray) -> torch.Tensor:
    """Channels first."""
    array = torch.from_numpy(np.ascontiguousarray(array))
    return array.movedim(-1, -3) if array.ndim > 2 else array


def with_alpha(picture: PIL.Image.Image) -> PIL.Image.Image:
    picture = picture.convert("LA" if picture.mode == "L" else "RGBA")
    picture.putalpha(7)
    return picture


COLOUR_FORMS = {
    "RGBA": with_alpha(RGB),
    "uint8": COLOURS,
    "uint8 batch": COLOURS[None],
    "uint8 with alpha": np.concatenate([COLOURS, COLOURS[..., :1]], axis=-1),
    "float64": shares(COLOURS, np.float64),
    "float32": shares(COLOURS, np.float32),
    "float16 batch": shares(COLOURS, np.float16)[None],
    "uint16": COLOURS.astype(np.uint16) * 257,
    "tensor uint8": tensor(COLOURS),
    "tensor float": tensor(shares(COLOURS, np.float32)),
    "tensor half batch": tensor(shares(COLOURS, np.float16)[None]),
    "tensor with gradient": tensor(shares(COLOURS, np.float32)).requires_grad_(),
    "list of pictures": [RGB],
    "tuple of arrays": (COLOURS,),
    "list of tensors": [tensor(shares(COLOURS, np.float64))],
    "list of batches": [tensor(COLOURS)[None]],
}
GREY_FORMS = {
    "L": GREY,
    "LA": with_alpha(GREY),
    "RGB": GREY.convert("RGB"),
    "P": GREY.convert("P"),
    "I;16": PIL.Image.fromarray(GREYS.astype(np.uint16) * 257),
    "I": PIL.Image.fromarray(GREYS.astype(np.int32) * 257),
    "F": PIL.Image.fromarray(shares(GREYS, np.float32)),
    "uint8": GREYS,
    "uint8 with channel": GREYS[..., None],
    "float": shares(GREYS, np.float32),
    "tensor": tensor(shares(GREYS, np.float32)),
    "tensor with channel": torch.from_numpy(GREYS)[None],
    "tensor batch": torch.from_numpy(GREYS)[None, None],
}
MASK_FORMS = {
    "1": MASK,
    "L": MASK.convert("L"),
    "RGB": MASK.convert("RGB"),
    "RGBA": with_alpha(MASK.convert("RGB")),
    "LA": with_alpha(MASK.convert("L")),
    "P": MASK.convert("RGB").quantize(2),
    "I;16": PIL.Image.fromarray(HOLE.astype(np.uint16) * 65535),
    "bool": HOLE,
    "bool with channel": HOLE[..., None],
    "bool with channels": np.repeat(HOLE[..., None], 3, -1),
    "bool batch": HOLE[None, ..., None],
    "uint8": HOLE * np.uint8(255),
    "uint8, at least half": np.where(HOLE, 128, 127).astype(np.uint8),
    "float": HOLE.astype(np.float32),
    "float, at least half": np.where(HOLE, 0.5, 0.499),
    "tensor bool": torch.from_numpy(HOLE),
    "tensor uint8": torch.from_numpy(HOLE * np.uint8(255))[None],
    "tensor half": torch.from_numpy(HOLE.astype(np.float16))[None, None],
    "tensor bfloat16": torch.from_numpy(HOLE).bfloat16(),
    "list": [HOLE],
    "list of tensors": [torch.from_numpy(HOLE)[None]],
}


@pytest.fixture(scope="module")
def paint():
    pipe = tiny.var_pipeline()

    def painted(image, mask, labels=(1,)):
        generators = [torch.Generator().manual_seed(n) for n in range(len(labels))]
        call = {"image": image, "mask_image": mask, "generator": generators, "output_type": "latent"}
        return pipe(list(labels), **call).images

    return painted


@pytest.fixture(scope="module")
def expected(paint):
    return {"colour": paint(RGB, MASK.convert("L")), "grey": paint(GREY.convert("RGB"), MASK.convert("L"))}


@pytest.mark.parametrize("form", COLOUR_FORMS)
def test_every_form_of_a_picture_is_that_picture(paint, expected, form):
    assert torch.equal(paint(COLOUR_FORMS[form], MASK), expected["colour"])


@pytest.mark.parametrize("form", GREY_FORMS)
def test_every_form_of_a_grey_picture_is_that_picture(paint, expected, form):
    assert torch.equal(paint(GREY_FORMS[form], MASK), expected["grey"])


@pytest.mark.parametrize("form", MASK_FORMS)
def test_every_form_of_a_mask_is_that_mask(paint, expected, form):
    assert torch.equal(paint(RGB, MASK_FORMS[form]), expected["colour"])


def test_a_palette_is_the_colours_that_it_stands_for(paint):
    palette = RGB.quantize(16)
    assert torch.equal(paint(palette, MASK), paint(palette.convert("RGB"), MASK))
    palette.info["transparency"] = 3
    assert torch.equal(paint(palette, MASK), paint(RGB.quantize(16).convert("RGB"), MASK))


def test_pictures_of_other_sizes_are_resized_alike_whatever_their_form(paint):
    large = np.random.default_rng(1).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    hole = np.zeros((9, 33), dtype=bool)
    hole[:5] = True
    found = paint(PIL.Image.fromarray(large), PIL.Image.fromarray(hole))
    assert torch.equal(paint(large, hole), found)
    assert torch.equal(paint(tensor(large), torch.from_numpy(hole).float()), found)


def test_a_picture_for_each_class_may_come_in_one_batch_or_in_a_list(paint):
    both = np.stack([COLOURS, COLOURS[::-1]])
    holes = np.stack([HOLE, HOLE[::-1]])
    found = paint([RGB, PIL.Image.fromarray(both[1])], [MASK, PIL.Image.fromarray(holes[1])], labels=(1, 2))
    assert torch.equal(paint(both, holes[..., None], labels=(1, 2)), found)
    assert torch.equal(paint(tensor(both), list(torch.from_numpy(holes)), labels=(1, 2)), found)
    with pytest.raises(UserError, match=r"^image must hold 1 or 3 pictures, got 2$"):
        paint(both, HOLE, labels=(1, 2, 3))


@pytest.mark.parametrize("read", [pictures, masks])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("picture.png", "must be of PIL, numpy or torch, or a list of these, got a str"),
        ([], "is empty: give at least one picture"),
        ([[0.0, 1.0]], "must be of PIL, numpy or torch, or a list of these, got a list"),
        (np.zeros(4), r"must be \[height, width\], .*, got \(4,\)"),
        (np.zeros((0, 4)), r"must be \[height, width\], .*, got \(0, 4\)"),
        (PIL.Image.new("L", (0, 4)), "is empty: 0 x 4 pixels"),
        (np.zeros((4, 4, 5)), r"must be .* with 1, 3 or 4 channels, got \(4, 4, 5\)"),
        (torch.zeros(5, 4, 3), r"must be \[height, width\], \[channels, .* with 1, 3 or 4 channels, got \(5, 4, 3\)"),
        (np.zeros((1, 1, 4, 4, 3)), r"must be \[height, width\]"),
        (np.zeros((4, 4), dtype=np.int64), "must be of uint8, uint16, bool or floating-point numbers, got int64"),
        (
            torch.zeros(4, 4, dtype=torch.complex64),
            "must be of uint8, uint16, bool or floating-point numbers, got complex",
        ),
        (np.full((4, 4), 1.5), "must be from 0 to 1 in float64, got 1.5 to 1.5"),
        (torch.full((4, 4), -0.5), "must be from 0 to 1 in float64, got -0.5 to -0.5"),
        (np.full((4, 4), np.nan), "must be from 0 to 1 in float64, got nan to nan"),
        (PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)), "must be from 0 to 65535 in mode I, got up to 70000"),
        (PIL.Image.fromarray(np.full((4, 4), 2, np.float32)), "must be from 0 to 1 in float32, got 2 to 2"),
    ],
)
def test_what_is_no_picture_is_named_in_one_line(read, value, message):
    with pytest.raises(UserError, match=f"^it {message}") as error:
        read(value, "it")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [HOLE.astype(np.uint8), PIL.Image.fromarray(HOLE.astype(np.uint8))])
def test_a_mask_of_whole_numbers_0_and_1_is_refused_for_it_would_keep_everything(value):
    with pytest.raises(UserError, match=r"^it holds whole numbers up to 1, where white is 255: give it as bool$"):
        masks(value, "it")
