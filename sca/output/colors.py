"""Colors that distinguish regions on any image."""

REGION_COLORS = (
    (230, 57, 70),
    (29, 120, 216),
    (46, 160, 67),
    (245, 159, 0),
    (142, 68, 173),
    (0, 172, 193),
    (232, 62, 140),
    (124, 179, 66),
    (109, 76, 65),
    (63, 81, 181),
)
FOREGROUND_COLOR, BACKGROUND_COLOR = (0, 170, 60), (220, 30, 40)  # points with label 1 and label 0


def get_region_color(index: int) -> tuple[int, int, int]:
    """Return the RGB color of a region by its index."""
    return REGION_COLORS[index % len(REGION_COLORS)]


def choose_text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever has more contrast."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 122 else (255, 255, 255)
