"""Shapes of linear layers for tests: (M tokens, N output features, K input features)."""

ODD_SHAPES = (
    (1, 1, 1),
    (3, 5, 7),
    (33, 31, 65),  # one above, one below and one above multiples of 32
    (129, 130, 127),  # one above, two above and one below 128
)
"""Shapes with no extent that is a multiple of a block. Every GEMM pads along its contraction axis,
which is M, N and K in turn."""

RECIPE_SHAPE = (160, 192, 224)
"""Shape with several MX blocks, and a whole and a partial 128-block, along every axis. All recipes
give different results on it."""

SQNR_SHAPE = (256, 384, 512)
"""Shape that is large enough for SQNR to vary little between seeds (see `tolerances`), and small
enough to take milliseconds on a CPU."""
