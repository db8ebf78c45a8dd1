"""Annotations of labeling tools in pixels of the image: one reader per tool, used wherever such a file is read.

`coco`, `label_studio` and `labelme` read the tools' records; `shapes` and `brush_rle` turn geometry into masks. Nothing
here opens a file of annotations. What cannot be kept is counted by reason, never dropped silently.
"""
