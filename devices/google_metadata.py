"""Asks the metadata server of a Google Cloud machine."""

import http.client
import os
import urllib.request

TIMEOUT = 3  # seconds for an answer, as google-auth has it


def get(path: str, max_bytes: int = 100_000) -> str | None:
    """Returns what the server knows of e.g. 'instance/preempted'; None if it does not answer."""
    # The address of metadata.google.internal, whose look-up has no time limit.
    host = os.environ.get('GCE_METADATA_HOST') or '169.254.169.254'
    # No proxy: the server is the machine's own.
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        request = urllib.request.Request(
            f'http://{host}/computeMetadata/v1/{path}', headers={'Metadata-Flavor': 'Google'}
        )
        with open_url(request, timeout=TIMEOUT) as response:
            return response.read(max_bytes).decode(errors='replace').strip()
    # ValueError: GCE_METADATA_HOST is not a host.
    except (OSError, ValueError, http.client.HTTPException):
        return None
