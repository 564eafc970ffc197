"""Jobs: a stopped job continues with its missing units, and a folder of another job is an error."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.platform.compute.jobs import NOTES_FOLDER, WORK_FOLDER, Job, check_same, run_job
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.storage import locked
from patchloom.platform.records.record import Record


class Squares(Record):
    """The plan: which numbers are squared, and a comment that may differ."""

    numbers: list[int]
    comment: str | None = None


@dataclass(frozen=True)
class Number:
    """A unit of one number."""

    value: int
    size: int = 1


class Squarer:
    """Writes the square of a number as its note. It stops like a killed process at the number 13."""

    def __init__(self, address: str) -> None:
        self.folder = Folder(address)

    def __call__(self, unit: Number, report: Callable[[int], None]) -> int:
        if unit.value == 13 and not self.folder.has("allow_13"):
            raise KeyboardInterrupt
        report(1)
        self.folder.write(f"{NOTES_FOLDER}/{unit.value:03d}", str(unit.value**2))
        return unit.value**2


class SquareJob(Job[Number, int]):
    """Squares numbers, one per unit."""

    title, worker, on_gpus = "squaring", Squarer, False
    folder: Folder

    def __init__(self, path: Path, plan: Squares, head_start_s: float = 0.0) -> None:
        self.folder, self.plan, self.total = Folder(str(path)), plan, len(plan.numbers)
        self.argument, self.head_start_s, self.kept = self.folder.address, head_start_s, list[int]()

    def start(self) -> bool:
        if self.folder.has("card"):
            return False
        if self.folder.has("plan"):
            found = Squares.parse(self.folder.read("plan"), "plan")
            check_same(self.folder, "squares", found, self.plan, ignored=("comment",))
        else:
            check_output_folder(self.folder, "squares", "plan")
            self.folder.write("plan", self.plan.to_json())
        return True

    def missing(self) -> list[Number]:
        notes = self.folder.folder(NOTES_FOLDER).files()
        return [Number(value) for value in self.plan.numbers if f"{value:03d}" not in notes]

    def keep(self, unit: Number, result: int) -> None:
        assert result == unit.value**2
        self.kept.append(unit.value)

    def finish(self) -> None:
        notes = [self.folder.read(f"{NOTES_FOLDER}/{name}") for name in self.folder.folder(NOTES_FOLDER).files()]
        self.folder.write("card", b" ".join(notes))
        self.folder.remove_folder(WORK_FOLDER)


def test_stopped_job_continues_with_the_missing_units(tmp_path: Path) -> None:
    plan = Squares(numbers=[2, 3, 13, 4])
    with pytest.raises(KeyboardInterrupt):
        run_job(SquareJob(tmp_path / "job", plan), workers=0)
    (tmp_path / "job" / "allow_13").touch()
    (tmp_path / "job" / WORK_FOLDER / ".half.0a1b2c3d.partial").write_text("half")
    job = SquareJob(tmp_path / "job", plan.model_copy(update={"comment": "other"}))
    assert run_job(job, workers=0).images == 2 and job.kept == [13, 4]
    assert job.folder.read("card") == b"4 9 16 169"
    assert not (tmp_path / "job" / WORK_FOLDER).exists()
    assert run_job(SquareJob(tmp_path / "job", plan), workers=0).images == 0


def test_short_job_ends_within_its_head_start(tmp_path: Path) -> None:
    job = SquareJob(tmp_path, Squares(numbers=[5, 6]), head_start_s=60)
    assert run_job(job, workers=None).images == 2 and job.kept == [5, 6]


def test_other_plan_names_the_changed_fields(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_job(SquareJob(tmp_path, Squares(numbers=[13])), workers=0)
    with pytest.raises(UserError, match=r"numbers.*\[13\].*\[7\]") as error:
        run_job(SquareJob(tmp_path, Squares(numbers=[7], comment="new")), workers=0)
    assert "comment" not in str(error.value)


def test_folder_with_other_files_or_in_use_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path)):
        run_job(SquareJob(tmp_path, Squares(numbers=[1])), workers=0)
    with locked(tmp_path), pytest.raises(UserError, match=str(tmp_path)):
        run_job(SquareJob(tmp_path, Squares(numbers=[1])), workers=0)
