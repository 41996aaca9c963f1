"""Real Linux guests under stock QEMU, moved for real (docs/qemu.md)."""
