"""Registration of the model, through lmms-eval's entry points `lmms_eval.models`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST: ModelManifest = ModelManifest("sca", simple_class_path="sca_lmms_eval.model.SegmentCaptionAnything")
