"""Models of pictures and text: three exports in one folder, calibrated and compared on what one hands to the next."""
