"""A registry with thousands of versions, written directly into a database of MLflow."""

import sqlalchemy
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion, SqlModelVersionTag, SqlRegisteredModel
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlParam, SqlRun


def fill_registry(uri: str, name: str, versions: int) -> None:
    """Add a model whose version V has the run `NAME` + V, fid V / 10, p = 0.25 or 0.5 in turn, and the tag half."""
    numbers = range(1, versions + 1)
    runs = {number: f"{name[:20]}{number:012d}" for number in numbers}
    engine = sqlalchemy.create_engine(uri)
    with engine.begin() as database:

        def add(table: type, rows: list[dict[str, object]]) -> None:
            database.execute(sqlalchemy.insert(table), rows)

        add(
            SqlRun,
            [
                {"run_uuid": run, "name": name, "experiment_id": 0, "status": "FINISHED", "user_id": "me"}
                for run in runs.values()
            ],
        )
        add(SqlLatestMetric, [{"key": "fid", "value": n / 10, "run_uuid": run} for n, run in runs.items()])
        add(SqlParam, [
            {"key": "patches.p", "value": "0.5" if n % 2 == 0 else "0.25", "run_uuid": run} for n, run in runs.items()
        ])  # fmt: skip
        add(SqlRegisteredModel, [{"name": name}])
        add(SqlModelVersion, [{"name": name, "version": n, "run_id": run, "source": "s"} for n, run in runs.items()])
        add(SqlModelVersionTag, [
            {"name": name, "version": n, "key": "half", "value": "first" if n <= versions // 2 else "second"}
            for n in numbers
        ])  # fmt: skip
        database.execute(sqlalchemy.text("ANALYZE"))  # as a server does now and then
    engine.dispose()
