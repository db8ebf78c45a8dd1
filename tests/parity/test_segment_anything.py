"""SAM and everything mode equal the original code (github.com/facebookresearch/segment-anything)."""

import numpy as np
import pytest
import torch
from PIL import Image
from sca_bench.mask_generators import convert_to_original_name
from sca_registry.contracts import PromptBatch
from sca_registry.spec import EverythingOptions

import sca
from sca.data.scenes import Scenes
from sca.encoders.sam import SamEncoder
from sca.inference.region_search import find_everything
from sca.io.masks import decode_rle
from sca.segmenters.sam import SamSegmenter

pytestmark = pytest.mark.all
pytest.importorskip("segment_anything", reason="the dependency group `references` is not installed")
from segment_anything import SamAutomaticMaskGenerator  # noqa: E402
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer  # noqa: E402

IMAGE_SIZE, HIDDEN_SIZE = 128, 64


@pytest.fixture(scope="module")
def encoder_and_segmenter():
    torch.manual_seed(0)
    vision_config = {
        "image_size": IMAGE_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vision_config |= {"mlp_dim": 4 * HIDDEN_SIZE, "window_size": 3, "global_attn_indexes": [1], "output_channels": 256}
    encoder = SamEncoder(pretrained=False, config={"vision_config": vision_config}).eval()
    for name, parameter in encoder.named_parameters():
        if "pos" in name:  # zeros until they are trained
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder, SamSegmenter(encoder, pretrained=False).eval()


@pytest.fixture(scope="module")
def original_sam(encoder_and_segmenter):
    image_encoder = ImageEncoderViT(
        img_size=IMAGE_SIZE,
        embed_dim=HIDDEN_SIZE,
        depth=3,
        num_heads=4,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
    )
    prompt_encoder = PromptEncoder(
        256, (IMAGE_SIZE // 16, IMAGE_SIZE // 16), (IMAGE_SIZE, IMAGE_SIZE), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    model = Sam(image_encoder, prompt_encoder, MaskDecoder(transformer_dim=256, transformer=transformer)).eval()
    tensors = {
        convert_to_original_name(name): tensor
        for part in encoder_and_segmenter
        for name, tensor in part.state_dict().items()
    }
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", ["box", "point", "points", "box and points", "box and mask"])
@torch.no_grad()
def test_sam_matches_the_original_code(encoder_and_segmenter, original_sam, kind, multimask):
    encoder, segmenter = encoder_and_segmenter
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    boxes = torch.tensor([[10.0, 20, 50, 90], [0, 0, 127, 40]]) if "box" in kind else None
    num_points = 3 if "points" in kind else 1
    points = torch.rand(2, num_points, 2, generator=generator) * IMAGE_SIZE if "point" in kind else None
    labels = torch.tensor([[1, 0, 1], [1, 1, 0]])[:, :num_points] if "point" in kind else None
    masks = torch.randn(2, 1, IMAGE_SIZE // 4, IMAGE_SIZE // 4, generator=generator) if "mask" in kind else None
    features = encoder(pixels)
    assert torch.allclose(features, original_sam.image_encoder(pixels), atol=1e-4)
    output = segmenter(features, PromptBatch(torch.zeros(2, dtype=torch.long), boxes, points, labels, masks), multimask)
    sparse, dense = original_sam.prompt_encoder(None if points is None else (points, labels), boxes, masks)
    expected, expected_scores = original_sam.mask_decoder(
        features, original_sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=multimask
    )
    assert torch.allclose(output.masks, expected, atol=1e-4)
    assert torch.allclose(output.iou_scores, expected_scores, atol=1e-4)


class ImageEncoderAdapter(torch.nn.Module):
    """Adapter of our model to the attributes of the original Sam."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.img_size = encoder, encoder.image_format.size

    def forward(self, pixels):
        return self.encoder(pixels)


class PointPromptEncoder(torch.nn.Module):
    """Prompt encoder stub that passes points to the decoder."""

    def get_dense_pe(self):
        return None

    def forward(self, points, boxes, masks):
        return points, None


class MaskDecoderAdapter(torch.nn.Module):
    """Adapter of our segmenter to the call of the original mask decoder."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        points, labels = sparse_prompt_embeddings
        prompts = PromptBatch(torch.zeros(len(points), dtype=torch.long), points=points.float(), labels=labels.long())
        regions = self.segmenter(image_embeddings, prompts, multimask_output)
        return regions.masks, regions.iou_scores


@pytest.fixture(scope="module")
def trained_model():
    return sca.load("sca-tiny")


@pytest.mark.parametrize("box_nms_thresh", [1.0, 0.7, 0.3])
@pytest.mark.parametrize(
    "search_options",
    [
        {"points_per_side": 6, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6},
        {"points_per_side": 8, "pred_iou_thresh": 0.8, "stability_score_thresh": 0.8},
        {"points_per_side": 6, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.3, "stability_score_offset": 2.0},
        {"points_per_side": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.3, "crop_n_layers": 1},
        {
            "points_per_side": 2,
            "pred_iou_thresh": 0.3,
            "stability_score_thresh": 0.5,
            "crop_n_layers": 2,
            "crop_overlap_ratio": 0.2,
        },
    ],
)
@pytest.mark.parametrize("image_size", [None, (320, 213), (100, 260)])
def test_everything_mode_matches_the_original_region_by_region(
    trained_model, search_options, box_nms_thresh, image_size
):
    image = Scenes("test", num_images=3)[2].image
    image = image if image_size is None else image.resize(image_size, Image.Resampling.BICUBIC)
    options = EverythingOptions(box_nms_thresh=box_nms_thresh, **search_options)
    predictor = sca.Predictor(trained_model)
    predictor.set_image(image)
    masks, _ = find_everything(predictor.engine, predictor.encoded, options)

    image_format = trained_model.encoder.image_format
    mean, std = ([255 * value for value in values] for values in (image_format.mean, image_format.std))
    sam = Sam(
        ImageEncoderAdapter(trained_model.encoder),
        PointPromptEncoder(),
        MaskDecoderAdapter(trained_model.segmenter),
        mean,
        std,
    ).eval()
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=options.points_per_side,
        pred_iou_thresh=options.pred_iou_thresh,
        stability_score_thresh=options.stability_score_thresh,
        stability_score_offset=options.stability_score_offset,
        box_nms_thresh=box_nms_thresh,
        crop_nms_thresh=box_nms_thresh,
        crop_n_layers=options.crop_n_layers,
        crop_overlap_ratio=options.crop_overlap_ratio,
    )
    with torch.no_grad():
        expected = generator.generate(np.asarray(image))
    expected = [each for each in expected if each["area"]]  # an empty mask is no region
    assert len(masks) == len(expected) > 0
    unmatched = list(expected)
    for mask in masks:
        mask_array = decode_rle(mask.rle)
        distances = [
            abs(min(each["predicted_iou"], 1.0) - mask.predicted_iou) * 1e3
            + (each["segmentation"] != mask_array).mean() * 1e3
            for each in unmatched
        ]
        nearest = int(np.argmin(distances))
        assert distances[nearest] < 1
        unmatched.pop(nearest)
