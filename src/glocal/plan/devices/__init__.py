"""Device tables: measured seconds of attention kernels, one JSON file a device, source and date inside."""
