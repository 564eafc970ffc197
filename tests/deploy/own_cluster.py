"""Starts a head and a worker as two nodes with addresses of their own, and drains the worker as AWS would ask for.

It runs in PID, mount and network namespaces of its own, so that ports and processes are those of no one else:

    unshare --pid --fork --kill-child --mount-proc --net python own_cluster.py HEAD_COMMAND WORKER_COMMAND SCRIPTS

HEAD and WORKER are commands of `ray start`, in which the head is called `head`. SCRIPTS is the folder of the node
scripts. Prints one JSON object.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

TOKEN = "a" * 64
HEAD_IP, WORKER_IP = "10.77.0.1", "10.77.0.2"
NETWORK = f"""
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p /tmp/ray
ip netns add worker
ip link add to_worker type veth peer name to_head netns worker
ip address add {HEAD_IP}/24 dev to_worker
ip link set to_worker up
ip route add default via {WORKER_IP}
ip -n worker link set lo up
ip -n worker address add {WORKER_IP}/24 dev to_head
ip -n worker link set to_head up
ip -n worker route add default via {HEAD_IP}
"""
ON_WORKER = ["ip", "netns", "exec", "worker"]
AWS_PAGES = {"/latest/api/token": "secret"}
NOTICE = "/latest/meta-data/spot/instance-action"


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata service of an AWS instance: a request without the session token is refused, a notice is a page."""

    def do_PUT(self) -> None:
        self.answer(AWS_PAGES.get(self.path))

    def do_GET(self) -> None:
        allowed = self.headers.get("X-aws-ec2-metadata-token") == "secret"
        self.answer(AWS_PAGES.get(self.path) if allowed else None)

    def answer(self, page: str | None) -> None:
        self.send_response(200 if page else 404)
        self.end_headers()
        self.wfile.write((page or "").encode())

    def log_message(self, *arguments: object) -> None:
        """No log."""


def start(command: str, token: str = TOKEN, before: str = "true", worker: bool = False) -> subprocess.Popen[bytes]:
    """A node; a worker has a network, and a folder of Ray, of its own."""
    command = f"{before}; exec {command.replace('head:6379', f'{HEAD_IP}:6379')}"
    own = [*ON_WORKER, "unshare", "--mount"] if worker else []
    arguments = [*own, "bash", "-c", f"mount -t tmpfs tmpfs /tmp/ray; {command}"]
    return subprocess.Popen(arguments, env=os.environ | {"RAY_AUTH_TOKEN": token}, stdout=sys.stderr)


def nodes() -> dict[str, dict[str, Any]]:
    import ray

    return {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}


def wait_until(condition: Any, seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return True
        except ConnectionError:
            pass
        time.sleep(0.5)
    return False


def connect() -> bool:
    import ray

    ray.init(address=f"{HEAD_IP}:6379", _node_ip_address=HEAD_IP, logging_level="ERROR", log_to_driver=False)
    return True


def main(head: str, worker: str, scripts: str) -> None:
    """Start, refuse, join, drain."""
    for line in NETWORK.strip().splitlines():
        subprocess.run(line.split(), check=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    start(head)
    refused = start(worker, token="b" * 64, worker=True)
    wait_until(connect)
    found: dict[str, Any] = {"refused": refused.wait(60), "nodes_after_refusal": len(nodes())}
    server = http.server.ThreadingHTTPServer((HEAD_IP, 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"METADATA_URL": f"http://{HEAD_IP}:{server.server_port}", "POLL_SECONDS": "1"}
    start(worker, before=f"(bash {scripts}/spot_notice.sh aws; touch {scripts}/noticed) & true", worker=True)
    wait_until(lambda: WORKER_IP in nodes())
    found["cpus"] = {address: node["Resources"].get("CPU", 0) for address, node in nodes().items()}
    time.sleep(3)
    found["drained_too_early"] = len(nodes()) < 2
    AWS_PAGES[NOTICE] = '{"action": "terminate", "time": "2026-11-26T08:22:00Z"}'
    wait_until(lambda: WORKER_IP not in nodes(), 60)
    found["left"] = list(nodes())
    wait_until(lambda: Path(scripts, "noticed").exists(), 60)
    found["script_ended"] = Path(scripts, "noticed").exists()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
