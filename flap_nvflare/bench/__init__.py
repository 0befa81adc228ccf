"""Speed and memory as ratios: `python -m flap_nvflare.bench`."""
