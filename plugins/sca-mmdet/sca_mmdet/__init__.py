"""MMDetection (github.com/open-mmlab/mmdetection) for segment-caption-anything, without a compiled mmcv."""
