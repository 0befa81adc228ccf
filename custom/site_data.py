"""Where this hospital's scans lie: the one file to edit if theirs is no layout that is known.

Known are those of KiTS19, IXI, SAML's prostate set, and of nnU-Net and the Decathlon with a table
`sites.csv`, which `flap-nvflare prepare` writes.

`flap-nvflare site init` puts this file into the startup kit as `local/custom/site_data.py`, and
leaves it alone once you have changed it. It runs in the site's own process, with that process's
rights, and nothing that a job brings can take its place.

The function returns every case that may be used, once. The package then checks that
- a name is made of letters, digits, "_", "-" and "." (it stays at this site);
- both files are NIfTI (.nii or .nii.gz) and lie in `data_root`, symbolic links followed;
- no file serves twice;
- there are training and test cases.
Which training cases are held out for validation is chosen by the job's seed.

An example: scans as DATA_ROOT/ct/P17.nii.gz, masks as DATA_ROOT/masks/P17.nii.gz, and the names
of the test cases, one a line, in DATA_ROOT/test.txt:

    def site_cases(data_root: Path, site: str) -> list[ListedCase]:
        test = set((data_root / "test.txt").read_text().split())
        return [
            ListedCase(
                name=image.name.removesuffix(".nii.gz"),
                image=image,
                label=data_root / "masks" / image.name,
                split="test" if image.name.removesuffix(".nii.gz") in test else "train",
            )
            for image in sorted((data_root / "ct").glob("*.nii.gz"))
        ]
"""

from __future__ import annotations

from pathlib import Path

from flap_nvflare.data.cases import ListedCase
from flap_nvflare.data.layouts import list_cases


def site_cases(data_root: Path, site: str) -> list[ListedCase]:
    """This site's cases.

    Args:
        data_root: the folder named in `flap_site.yaml`.
        site: this site's name in its data.
    """
    return list_cases(data_root, site)
