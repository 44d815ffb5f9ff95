import sys; sys.path.insert(0,"/tmp/w"); 
import os
import torch
DEV="cuda" if torch.cuda.is_available() else "cpu"
if DEV=="cpu": import mend
from dataclasses import replace
from glocal.kernels import windows as backend, reference
from glocal.kernels.call import Call, PlanTensors, TableBias
from glocal.canvas import Canvas, Layout
from glocal.patterns import *
from glocal.patterns.windows import Windows
from glocal.patterns.grid import Grid
from glocal.plan.windows import window_plan
from glocal.ops.score import Relative, Score
import time
torch.manual_seed(0)
def one(pat,cv,d=16,dv=16,h=(2,2),b=3,bias=False,dtype=torch.float32):
    t0=time.time()
    made=window_plan(pat,Canvas(cv),device=DEV); n=made.layout.nq
    qkv=torch.randn(b,n,3,max(h),max(d,dv)).to(dtype).to(DEV)
    q,k,v=qkv[:,:,0,:h[0],:d].transpose(1,2),qkv[:,:,1,:h[1],:d].transpose(1,2),qkv[:,:,2,:h[1],:dv].transpose(1,2)
    g=torch.randn(b,h[0],n,dv).to(dtype).to(DEV); gl=torch.randn(b,h[0],n).to(DEV)
    bs=()
    if bias:
        bs=(Relative(torch.randn(h[0],*[5]*len(cv)).to(DEV)).lower(made.layout),)
    call=Call("windows",0.3,q_block=made.q_block,kv_block=made.kv_block,plan=PlanTensors(**made.tensors()),bias=bs)
    ref=Call("reference",0.3,counts=made.dense_counts(),bias=bs)
    o,l=backend.forward(q,k,v,call); o2,l2=reference.forward(q,k,v,ref)
    tol=2e-5 if dtype==torch.float32 else 4e-2
    torch.testing.assert_close(o,o2,rtol=tol,atol=tol); torch.testing.assert_close(l,l2,rtol=tol,atol=tol)
    G=backend.backward(g,gl,q,k,v,o,l,call); R=reference.backward(g,gl,q,k,v,o2,l2,ref)
    for x,y,nm in zip((G.q,G.k,G.v,*G.bias),(R.q,R.k,R.v,*R.bias),("q","k","v","bias")):
        assert x.shape==y.shape and x.dtype==y.dtype,nm
        torch.testing.assert_close(x,y,rtol=tol*(1 if nm!="bias" else 4),atol=tol*(1 if nm!="bias" else 4),msg=lambda m,nm=nm: nm+m)
    print("ok",pat,cv,d,h,bias,dtype,f"{time.time()-t0:.1f}",flush=True)
if __name__=="__main__":
  one(Neighborhood(3),(5,7),bias=True)
  one(Neighborhood(7),(9,8),d=8,h=(4,2))
  one(Windows(3,roll=1),(6,7),bias=True,dv=20)
  one(Grid(4),(8,9),b=1)
  one(Neighborhood(5,causal=(True,False),dilation=(1,2)),(8,12),b=1,bias=True)
  one(Neighborhood(4,stride=2),(17,),b=2,dtype=torch.bfloat16)
  one(Neighborhood(9),(14,13),b=1,bias=True)
