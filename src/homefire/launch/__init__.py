"""Starting, watching and stopping processes. One protocol, and a launcher per place to run them."""

from homefire.launch.protocol import Exit, Launcher, ProcessRecord, ProcessSpec

__all__ = ["Exit", "Launcher", "ProcessRecord", "ProcessSpec"]
