"""Methods put into other people's models and taken out again."""

from glocal.adapt.attach import Handle, Method, attach, open_handles, sites_of
from glocal.adapt.c_upscale import c_upscale
from glocal.adapt.freeswim import freeswim
from glocal.adapt.fused_norms import fused_norms
from glocal.adapt.gna import gna
from glocal.adapt.hidiffusion import hidiffusion
from glocal.adapt.host import HostAdapter, host_of, register_host
from glocal.adapt.paro import paro
from glocal.adapt.private import discover, site
from glocal.adapt.radial import radial
from glocal.adapt.records import Block, RunState, Site, SiteCall
from glocal.adapt.rectified_spaattn import rectified_spaattn
from glocal.adapt.scale_dit import scale_dit
from glocal.adapt.tile_windows import tile_windows
from glocal.adapt.ultragen import ultragen

__all__ = [
    "Block",
    "Handle",
    "HostAdapter",
    "Method",
    "RunState",
    "Site",
    "SiteCall",
    "attach",
    "c_upscale",
    "discover",
    "freeswim",
    "fused_norms",
    "gna",
    "hidiffusion",
    "host_of",
    "open_handles",
    "paro",
    "radial",
    "rectified_spaattn",
    "register_host",
    "scale_dit",
    "site",
    "sites_of",
    "tile_windows",
    "ultragen",
]
