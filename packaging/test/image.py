"""Makes an OCI image of a directory: image.py FILE NAME DIRECTORY ENTRYPOINT..."""
import hashlib
import io
import json
import sys
import tarfile

file, name, directory, *entrypoint = sys.argv[1:]
blobs = {}


def blob(media_type, content):
    digest = hashlib.sha256(content).hexdigest()
    blobs["blobs/sha256/" + digest] = content
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(content)}


layer = io.BytesIO()
with tarfile.open(fileobj=layer, mode="w") as tar:
    tar.add(directory, arcname=".")
layer = blob("application/vnd.oci.image.layer.v1.tar", layer.getvalue())
config = {
    "architecture": "amd64",
    "os": "linux",
    "config": {"Entrypoint": entrypoint},
    "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
}
config = blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode())
media_type = "application/vnd.oci.image.manifest.v1+json"
manifest = {"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]}
manifest = blob(media_type, json.dumps(manifest).encode())
manifest["annotations"] = {"io.containerd.image.name": name}
blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
with tarfile.open(file, "w") as tar:
    for path, content in blobs.items():
        info = tarfile.TarInfo(path)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
