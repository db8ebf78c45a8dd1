"""MMDetection (github.com/open-mmlab/mmdetection) plugin, which needs no compiled mmcv."""
