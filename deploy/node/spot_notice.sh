#!/usr/bin/env bash
# Waits until the cloud announces that it takes this spot instance back, then drains the node from Ray: training
# writes a checkpoint at once and goes on without the node. Ray itself does not watch for the notice.
#
#   setsid nohup bash spot_notice.sh aws </dev/null >/tmp/spot_notice.log 2>&1 &
#
# AWS announces it 120 seconds ahead, Google Cloud 30. METADATA_URL names another metadata server.
set -uo pipefail

cloud=${1:?aws or gcp}
metadata=${METADATA_URL:-http://169.254.169.254}
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

announced() {
    case $cloud in
    aws) # the page does not exist (404) until there is a notice
        token=$(curl -sf -m 5 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") &&
            curl -sf -m 5 -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"
        ;;
    gcp)
        curl -sf -m 5 -H "Metadata-Flavor: Google" "$metadata/computeMetadata/v1/instance/preempted" | grep -x TRUE
        ;;
    esac >/dev/null
}

case $cloud in
aws) remaining=110 ;;
gcp) remaining=25 ;;
*)
    echo "spot_notice.sh: '$cloud' is neither aws nor gcp" >&2
    exit 2
    ;;
esac
until announced; do sleep "${POLL_SECONDS:-5}"; done
echo "$(date -u +%FT%TZ) the instance will be taken back: draining the node"
exec bash "$folder/drain.sh" worker "$remaining"
