"""Minimal example of a plugin: the mixer `hello`."""

from torch import nn


class HelloMixer(nn.Module):
    """Mixer with one query per region: a linear layer over the mean output token of the mask decoder.

    Args:
        segmenter: Segmenter with hidden size D.
    """

    num_queries = 1
    uses_grid = False

    def __init__(self, segmenter):
        super().__init__()
        self.hidden_size = segmenter.channels
        self.layer = nn.Linear(self.hidden_size, self.hidden_size)

    def forward(self, regions):
        """Return the query embeddings of each region, (N, 1, D)."""
        return self.layer(regions.tokens.mean(dim=1, keepdim=True))
