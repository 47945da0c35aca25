"""What MTP's gradient does to the trunk, taken apart without updating: measured, judged, shown."""
