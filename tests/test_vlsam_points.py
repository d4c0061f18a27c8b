"""Points of a map, and SAM's masks against calls of transformers' SamModel and its processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SamConfig, SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import regard
from regard.interventions import vlsam

SIDE = 64


def field(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)


TWO = field(
    [
        [0.9, 0.0, 0.1, 0.1, 0.1],
        [0.1, 0.1, 0.5, 0.6, 0.1],
        [0.1, 0.1, 0.5, 0.4, 0.1],
        [0.1, 0.1, 0.1, 0.1, 0.05],
    ]
)


def test_the_largest_area_has_the_positive_point_though_another_is_stronger() -> None:
    found = vlsam.points(TWO)
    assert found.area.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert found.positive == pytest.approx((3.5 / 5, 1.5 / 4))
    assert found.negative == pytest.approx((1.5 / 5, 0.5 / 4))


def test_the_threshold_is_a_quantile() -> None:
    assert vlsam.points(TWO, quantile=0.93).area.nonzero().tolist() == [[0, 0]]
    assert int(vlsam.points(TWO, quantile=0.0).area.sum()) == 19
    with pytest.raises(ValueError, match=r"from 0 to below 1, got 1\.0"):
        vlsam.points(TWO, quantile=1.0)


def test_corners_do_not_connect_and_of_equal_areas_the_stronger_is_taken() -> None:
    found = vlsam.points(field([[0.8, 0, 0, 0], [0, 0.9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]), quantile=0.7)
    assert found.area.nonzero().tolist() == [[1, 1]]
    assert found.positive == (1.5 / 4, 1.5 / 4)


def test_the_negative_point_can_come_from_another_map() -> None:
    rest = torch.ones_like(TWO)
    rest[3, 0] = 0
    rest[1, 2] = -1  # in the area
    assert vlsam.points(TWO, rest=rest).negative == pytest.approx((0.5 / 5, 3.5 / 4))


@pytest.mark.parametrize("wrong", [torch.ones(3, 3), torch.full((3, 3), torch.nan), torch.zeros(2, 2)])
def test_a_map_without_a_strongest_place_says_so(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="constant or not finite"):
        vlsam.points(wrong)


def test_a_map_has_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        vlsam.points(torch.ones(9))


def test_a_map_most_of_which_is_its_maximum_says_so() -> None:
    with pytest.raises(ValueError, match="take a smaller one"):
        vlsam.points(field([[1.0, 1.0], [1.0, 0.0]]))


def test_the_part_that_the_model_sees() -> None:
    _, processor = regard.load_miniature("lvlm")
    assert vlsam.seen_box(processor, 64, 64) == (0, 0, 64, 64)
    assert vlsam.seen_box(processor, 300, 100) == (100, 0, 200, 100)
    assert vlsam.seen_box(processor, 90, 120) == (0, 15, 90, 105)
    assert vlsam.seen_box(SamImageProcessorPil(), 90, 120) == (0, 0, 90, 120)
    # what the processor itself cuts out
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255
    pixels = processor.image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert pixels[0, 0, :, 2:-2].min() == pixels.amax((0, 2, 3))[0]


# ------------------------------------------------------------------------------------------------ SAM


@pytest.fixture(scope="module")
def sam() -> Any:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE}
    vision |= {"patch_size": 8, "output_channels": 16, "mlp_dim": 32, "window_size": 4, "num_pos_feats": 8}
    vision |= {"global_attn_indexes": [1]}
    prompts = {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 8}
    prompts |= {"image_embedding_size": 8}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SamModel(config)
    rng = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            gain = 1.0 if "embed" in name else weight[0].numel() ** -0.5 * 1.5
            weight.data.normal_(std=gain, generator=rng)
    return model.eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return SamImageProcessorPil(
        size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}, mask_size={"longest_edge": 32}
    )


def picture(width: int = 60, height: int = 40) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def mention(values: Tensor, word: str = "dog") -> Any:
    return vlsam.ObjectMap(word, 0, (5,), (values,), values.flatten())


def blob(seed: int = 1) -> Tensor:
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))


class Reference:
    """SAM as its documentation uses it, whole images through the processor, one call after the other."""

    def __init__(self, sam: Any, processor: Any, image: Image.Image) -> None:
        self.sam, self.processor = sam, processor
        self.made = processor(images=image, return_tensors="pt")
        (self.height, self.width), (self.high, self.wide) = (
            self.made[key][0].tolist() for key in ("original_sizes", "reshaped_input_sizes")
        )

    @torch.no_grad()
    def __call__(
        self, xy: list[tuple[float, float]], logits: Tensor | None = None
    ) -> tuple[Tensor, float, Tensor]:
        """Points in pixels of the image, (x, y) of the positive and the negative one."""
        places = [[x * self.wide / self.width - 0.5, y * self.high / self.height - 0.5] for x, y in xy]
        out = self.sam(
            pixel_values=self.made["pixel_values"],
            input_points=torch.tensor([[places]]),
            input_labels=torch.tensor([[[1, 0]]]),
            input_masks=logits,
            multimask_output=logits is None,
        )
        best = int(out.iou_scores[0, 0].argmax())
        low = out.pred_masks[:, 0, best : best + 1]
        sizes = self.made["original_sizes"], self.made["reshaped_input_sizes"]
        return (
            self.processor.post_process_masks([low], *sizes)[0][0, 0],
            float(out.iou_scores[0, 0, best]),
            low,
        )


def pixels_of(
    found: Any, width: float, height: float, left: float = 0, top: float = 0
) -> list[tuple[float, float]]:
    return [(left + x * width, top + y * height) for x, y in (found.positive, found.negative)]


def same(one: Any, mask: Tensor, score: float) -> None:
    assert torch.equal(one.mask, mask)
    assert one.score == pytest.approx(score, abs=1e-5)


def test_the_first_mask_is_sams_own(sam: Any, processor: Any) -> None:
    image = picture()
    want, score, _ = Reference(sam, processor, image)(pixels_of(vlsam.points(blob()), 60, 40))
    assert 0 < int(want.sum()) < want.numel()
    (found,) = vlsam.masks(sam, processor, image, [mention(blob())], refine=False)
    assert found.mask.shape == (40, 60)
    assert found.word == "dog"
    same(found, want, score)


def test_a_box_says_where_the_map_lies(sam: Any, processor: Any) -> None:
    image = picture()
    places = pixels_of(vlsam.points(blob()), 30, 20, 20, 10)
    want, score, _ = Reference(sam, processor, image)(places)
    (found,) = vlsam.masks(sam, processor, image, [mention(blob())], box=(20, 10, 50, 30), refine=False)
    same(found, want, score)
    (whole,) = vlsam.masks(sam, processor, image, [mention(blob())], refine=False)
    assert not torch.equal(found.mask, whole.mask)
    with pytest.raises(ValueError, match="does not lie in an image of width 60 and height 40"):
        vlsam.masks(sam, processor, image, [mention(blob())], box=(0, 0, 61, 40))


@pytest.mark.parametrize("seed", [1, 4, 6])
def test_the_mask_goes_back_and_points_are_drawn_again(sam: Any, processor: Any, seed: int) -> None:
    image, values = picture(), blob(seed)
    ask = Reference(sam, processor, image)
    first = pixels_of(vlsam.points(values), 60, 40)
    _, _, logits = ask(first)
    mask, score, _ = ask(first, logits)
    inside = values * mask.float().reshape(4, 10, 6, 10).mean((1, 3))
    again = vlsam.points(inside, rest=values)
    places = pixels_of(again, 60, 40)
    _, _, logits = ask(places)
    other, second, _ = ask(places, logits)
    found = vlsam.masks(sam, processor, image, [mention(values)], overlap=1.0)
    want = sorted([(score, mask), (second, other)], key=lambda pair: -pair[0])
    assert len(found) == 2
    for one, (value, region) in zip(found, want, strict=True):
        same(one, region, value)


def test_without_a_processor_the_image_is_sams_own_pixels(sam: Any, processor: Any) -> None:
    image = picture(SIDE, SIDE)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    own = vlsam.masks(sam, None, pixels[0], [mention(blob())])
    for one, other in zip(own, vlsam.masks(sam, processor, image, [mention(blob())]), strict=True):
        same(one, other.mask, other.score)
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\), got \(1, 3, 32, 64\)"):
        vlsam.masks(sam, None, pixels[0, :, :32], [mention(blob())])


def test_the_map_of_the_right_image_is_taken(sam: Any, processor: Any) -> None:
    two = vlsam.ObjectMap("dog", 0, (5,), (blob(1), blob(2)), torch.zeros(1))
    (found,) = vlsam.masks(sam, processor, picture(), [two], which=1, refine=False)
    assert found.points.positive == vlsam.points(blob(2)).positive


def test_another_model_is_refused(processor: Any) -> None:
    with pytest.raises(regard.CannotEdit, match="needs a SamModel of transformers, got Linear"):
        vlsam.masks(torch.nn.Linear(1, 1), processor, picture(), [])


def test_of_masks_that_overlap_the_best_stays() -> None:
    def made(word: str, score: float, *columns: int) -> Any:
        mask = torch.zeros(2, 10, dtype=torch.bool)
        mask[:, list(columns)] = True
        return vlsam.ObjectMask(word, mask, score, vlsam.points(TWO))

    found = [
        made("a", 0.5, 0, 1, 2, 3),
        made("b", 0.9, 0, 1, 2),
        made("c", 0.7, 2, 3, 4, 5),
        made("d", 0.8),
        made("e", 0.6, 2, 3, 4),
    ]
    assert [item.word for item in vlsam.suppressed(found, 0.7)] == ["b", "c"]  # a b: 3/4, e c: 3/4
    assert [item.word for item in vlsam.suppressed(found, 0.75)] == ["b", "c", "e", "a"]
    assert [item.word for item in vlsam.suppressed(found, 0.1)] == ["b"]
    with pytest.raises(ValueError, match="have one shape"):
        vlsam.suppressed([found[0], vlsam.ObjectMask("f", torch.ones(2, 2).bool(), 1.0, vlsam.points(TWO))])


def test_words_compete(sam: Any, processor: Any) -> None:
    items = [mention(blob(1), "dog"), mention(blob(1), "puppy")]
    found = vlsam.masks(sam, processor, picture(), items, refine=False)
    assert [item.word for item in found] == ["dog"]
