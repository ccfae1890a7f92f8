# Second stage: names what the job needs, runs it with its own limit, keeps its exit status, switches the machine off.
cd /run/aiocomm
hostname guest
. ./environment.sh
# What Python loads comes from a disk, over the folders that it was copied from; image.py says why.
modprobe -a virtio_blk ext4
mkdir -p /run/image
mount -t ext4 -o ro,noatime /dev/vda /run/image
while IFS= read -r name && IFS= read -r folder; do
  mkdir -p "/run/layer/$name/upper" "/run/layer/$name/work"
  layers="lowerdir=/run/image/$name,upperdir=/run/layer/$name/upper,workdir=/run/layer/$name/work"
  mount -t overlay -o "$layers" overlay "$folder"
done <mounts
# Only pyverbs of the system's Python, not its other packages.
mkdir -p /run/pyverbs
[ -d /usr/lib/python3/dist-packages/pyverbs ] && ln -s /usr/lib/python3/dist-packages/pyverbs /run/pyverbs/pyverbs
export PYTHONPATH=/run/pyverbs
{
  . ./hosts.sh
  cd "$JOB_FOLDER"
  # An interrupt first: pytest then still writes what it knows.
  timeout -s INT -k 10 "$JOB_LIMIT_S" bash /run/aiocomm/job.sh
  echo $? >/run/aiocomm/status.new
} </dev/null >/run/aiocomm/output.log 2>&1 &
wait $!
dmesg >/run/aiocomm/dmesg.log 2>/dev/null
mv /run/aiocomm/status.new /run/aiocomm/status
sync
busybox poweroff -f
