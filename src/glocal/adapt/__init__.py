"""Methods put into other people's models and taken out again."""

from glocal.adapt.attach import Handle, Method, attach, open_handles, sites_of
from glocal.adapt.host import HostAdapter, host_of, register_host
from glocal.adapt.private import discover, site
from glocal.adapt.records import Block, RunState, Site, SiteCall

__all__ = [
    "Block",
    "Handle",
    "HostAdapter",
    "Method",
    "RunState",
    "Site",
    "SiteCall",
    "attach",
    "discover",
    "host_of",
    "open_handles",
    "register_host",
    "site",
    "sites_of",
]
