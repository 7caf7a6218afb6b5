# SPDX-License-Identifier: Apache-2.0
"""From jaxprs to ONNX. Imported only where ONNX is asked for: `onnx` is an extra.

graph, quantized            what is written, and what of it was decoded from few bits
convert                     walks a jaxpr; one rule per primitive in the files of rules
sites, decode               how quantized sites are seen in the jaxpr
passes                      forms for which runtimes have integer kernels
write, model, session       from a function to a file and to results
audit, rows                 which kernels run; what is stored
"""
