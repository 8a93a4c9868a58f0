"""`openrft serve`: the API on one address, until interrupted."""

from __future__ import annotations

import json
import socket

from tasks.errors import BadInput
from tasks.home import Home


def serve(home: Home, host: str, port: int, as_json: bool) -> None:
    """Serve promoted models. Port 0 takes a free one. Raises BadInput when the address cannot be used."""
    import uvicorn

    from api.app import create_app
    from api.engine import Engine, check_home

    check_home(home)
    engine = Engine(home)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # from here on a request waits rather than being refused
    except OSError as error:
        raise BadInput(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    address = f"http://{host}:{listener.getsockname()[1]}/v1"
    for model in engine.models():
        engine.load(model.key)  # the first request should not wait for the disk
    names = [model.id for model in engine.models()]
    if as_json:
        print(json.dumps({"base_url": address, "models": names}), flush=True)
    else:
        print(f"Serving {', '.join(names)}\nbase_url  {address}\nCtrl-C stops.", flush=True)
    config = uvicorn.Config(create_app(engine), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])
