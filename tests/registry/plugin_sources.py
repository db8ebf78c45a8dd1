"""Source code of components in test plugins."""

MIXER_SOURCE = """
    class Mean:
        '''A mean.'''

        hidden_size, num_queries, uses_grid = 8, 1, False

        def __init__(self, segmenter, depth=1):
            self.segmenter, self.depth = segmenter, depth

        def __call__(self, regions):
            return regions
"""
