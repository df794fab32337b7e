"""rema-verl: two-role ReMA dialogues and MPDF deliberation on stock verl, as a plug-in.

Start reading at :mod:`rema_verl.plugin`, the table of contents. This file stays empty of imports: verl loads the
package in every process, vLLM's workers included.
"""

__version__ = "0.1.0"
