"""Writes kubernetes_schema.json.xz: what the manifests use of Kubernetes' own API schema, without descriptions.

    pip install kubernetes-validate && python tests/deploy/make_kubernetes_schema.py

The package ships the OpenAPI definitions of Kubernetes (Apache-2.0) as JSON schemas that refuse unknown fields.
"""

import json
import lzma
from pathlib import Path
from typing import Any

import kubernetes_validate

VERSION = "v1.37.0"
CORE = "io.k8s.api.core.v1"
ROOTS = (f"{CORE}.PodTemplateSpec", f"{CORE}.ConfigMap", "io.k8s.api.batch.v1.CronJob")


def stripped(schema: Any) -> Any:
    """A schema without descriptions and Kubernetes' extensions, which refers to definitions of the same file."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            return {"$ref": f"#/definitions/{schema['$ref'].rpartition('/')[2]}"}
        texts = {key for key, value in schema.items() if key == "description" and isinstance(value, str)}
        return {key: stripped(value) for key, value in schema.items() if key not in texts and not key.startswith("x-")}
    return [stripped(item) for item in schema] if isinstance(schema, list) else schema


def references(schema: Any) -> set[str]:
    """Names of all definitions that a schema refers to."""
    if isinstance(schema, dict):
        own = {schema["$ref"].rpartition("/")[2]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*map(references, schema.values()))
    return set().union(*map(references, schema)) if isinstance(schema, list) else set()


def main() -> None:
    """Collect the definitions that ROOTS need, and write them."""
    folder = Path(kubernetes_validate.__file__).parent / f"kubernetes-json-schema/{VERSION}-local-strict"
    known = json.loads((folder / "_definitions.json").read_text())["$defs"]
    kept: dict[str, Any] = {}
    waiting = set(ROOTS)
    while waiting:
        name = waiting.pop()
        kept[name] = stripped(known[name])
        waiting |= references(kept[name]) - set(kept)
    text = json.dumps({"definitions": dict(sorted(kept.items()))}, separators=(",", ":"))
    (Path(__file__).parent / "kubernetes_schema.json.xz").write_bytes(lzma.compress(text.encode()))


if __name__ == "__main__":
    main()
