"""Methods put into other people's models and taken out again."""

from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.host import HostAdapter, host_of, register_host
from glocal.adapt.records import RunState, Site, SiteCall

__all__ = ["Handle", "HostAdapter", "Method", "RunState", "Site", "SiteCall", "attach", "host_of", "register_host"]
