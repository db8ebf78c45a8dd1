"""Read the annotations of labeling tools, in pixels of the image.

`coco`, `label_studio` and `labelme` read the records of each tool. `shapes` and `brush_rle` convert geometry to masks.
These modules do not open annotation files. Contents that cannot be kept are counted by reason, never dropped silently.
"""
