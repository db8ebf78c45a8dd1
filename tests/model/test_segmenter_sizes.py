"""Random segmenters have the sizes in the configuration of their encoder, so that plans are exact."""

import pytest
import sca_registry
from tiny_segmenters import SAM2_CONFIGS, SAM_CONFIG, SAM_HQ_CONFIG, build_tiny_model

CONFIGS = {"sam": SAM_CONFIG, "sam2": SAM2_CONFIGS["sam2"], "sam-hq": SAM_HQ_CONFIG}
MODEL_TYPES = {"sam": "sam", "sam2": "sam2", "sam-hq": "sam_hq"}


def list_shapes(segmenter):
    return {name: tuple(tensor.shape) for name, tensor in segmenter.state_dict().items()}


@pytest.mark.parametrize("decoder_fields", [{}, {"attention_downsample_rate": 1, "num_multimask_outputs": 4}])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_segmenter_has_the_sizes_of_its_encoder(name, decoder_fields, tmp_path):
    config = {**CONFIGS[name], "mask_decoder_config": {**CONFIGS[name]["mask_decoder_config"], **decoder_fields}}
    build_tiny_model(MODEL_TYPES[name], config).save_pretrained(tmp_path)
    encoder = sca_registry.encoders.build(name, weights=str(tmp_path))
    expected = list_shapes(sca_registry.segmenters.build(name, encoder))
    for options in ({"weights": str(tmp_path)}, {"config": config}):
        random_encoder = sca_registry.encoders.build(name, **options, pretrained=False)
        assert list_shapes(sca_registry.segmenters.build(name, random_encoder)) == expected
    deeper = sca_registry.segmenters.build(name, random_encoder, depth=3)
    assert len(deeper.decoder.transformer.layers) == 3
