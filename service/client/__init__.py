"""The service from Python: `Client().adapt("photos/", task="garage-door").classify("now.jpg").label`.

Needs httpx and nothing else of the project: neither the server's libraries nor a model.

    sync.py, aio.py   Client and AsyncClient, Task and AsyncTask: two thin drivers
    plans.py          every use of the API, written once
    wire.py           requests and answers as values; what is tried again, and when
    pictures.py       folders, patterns, bytes, PIL images as files with labels
    values.py         what is answered;  errors.py  what can go wrong;  http.py  all that knows httpx besides the two
"""

from service.client.aio import AsyncClient as AsyncClient
from service.client.aio import AsyncTask as AsyncTask
from service.client.errors import *  # noqa: F403
from service.client.sync import Client as Client
from service.client.sync import Task as Task
from service.client.values import *  # noqa: F403
