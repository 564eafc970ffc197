"""Frame: the trials of a search as a pandas DataFrame, for plots and tables of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchloom.errors import UserError
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.search import SEARCH_FILE, SearchCard, TrialRow, read_trials

if TYPE_CHECKING:
    import pandas as pd

BY_SIGMA = "held_out_loss_by_sigma"


def load_trials(search: str) -> pd.DataFrame:
    """Read the trials of a search as a data frame.

    The search may still be running: then the frame has the trials that have ended.

    Args:
        search: the `--out` folder of `patchloom tune`; may be remote.

    Returns:
        One row per trial, named as its folder. The columns are the settings, named as recipe keys (`patches.p`), and
        the numbers of the trial: `repeat`, `status`, `updates`, `images_seen`, `flops`, `held_out_loss`,
        `held_out_loss_by_sigma.1`, ... What a trial does not have is NaN or None. `attrs["keys"]` lists the settings.

    Raises:
        UserError: the folder is not a search, or a row is damaged.

    Example:
        trials = patchloom.load_trials("search")
        best = trials.sort_values("held_out_loss").iloc[0]
        print(trials.groupby("patches.p")["held_out_loss"].mean())
    """
    import pandas as pd

    folder = Folder.at(search)
    if not folder.has(SEARCH_FILE):
        raise UserError(f"{folder} is not a search: give the --out folder of `patchloom tune`")
    card, rows = SearchCard.read(folder), read_trials(folder)
    keys = list(dict.fromkeys([*card.search.space, *(key for row in rows for key in row.settings)]))
    numbers = [name for name in TrialRow.model_fields if name not in ("settings", BY_SIGMA)]
    levels = sorted({level for row in rows for level in row.held_out_loss_by_sigma}, key=float)
    columns = [*keys, *numbers, *(f"{BY_SIGMA}.{level}" for level in levels)]
    frame = pd.DataFrame([_flat(row) for row in rows], columns=columns).set_index("name")
    frame.attrs["keys"] = keys
    return frame


def _flat(row: TrialRow) -> dict[str, object]:
    values = {name: getattr(row, name) for name in TrialRow.model_fields if name not in ("settings", BY_SIGMA)}
    by_sigma = {f"{BY_SIGMA}.{level}": loss for level, loss in row.held_out_loss_by_sigma.items()}
    return {**row.settings, **values, **by_sigma}
