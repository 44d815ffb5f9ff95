"""Variants of the window kernels side by side on a card, each checked first: python bench/windows_trials.py."""
import sys, torch, time, json, os
sys.path.insert(0, "bench")
import small_windows as sw
from glocal.kernels.windows import launch
from glocal.measure import compare_paired
WARM = sys.argv[2:] if len(sys.argv)>1 else []; t0=time.time(); OUT=os.environ.get("OUT","/tmp")
def F(a,f=False,s=True,**m): return dict(AHEAD=a,FRESH=f,SETTLE=s,**m)
def setup(direct=128, piece=64, **t):
    launch.DIRECT_COLUMNS=direct; launch.PIECE=piece; launch.TRY.clear(); launch.TRY.update(t)
R=dict(maxnreg=168)
def B(a,**m): return {p:dict(AHEAD=a,**m) for p in ("queries","table","keys")}
FW={"tiles":dict(direct=0),"ahead":dict(forward=F(1)),"ahead2":dict(forward=F(2)),"fresh168":dict(forward=F(0,True,**R)),"old":dict(forward=F(1,s=False))}
BW={"tiles":dict(direct=0),"ahead":B(True),"plain":B(False),"ahead168":dict(piece=32,**B(True,**R)),"plain168":dict(piece=32,**B(False,**R))}
W=lambda d:{k:(dict(v,direct=256) if k!="tiles" else v) for k,v in d.items()}
pick=lambda d,*n:{k:d[k] for k in n}
CASES={1:(FW,BW),0:(FW,BW),2:(pick(W(FW),"tiles","ahead","fresh168"),pick(W(BW),"tiles","ahead","ahead168")),
  4:({"tiles":{}, "ahead":{"bias forward":1}},{"tiles":dict(direct=0),"ahead":{}}),
  6:({"tiles":{}, "direct":{"rows":64,"bias forward":1}},{"tiles":dict(direct=0),"direct":dict(rows=64)})}
best={}
for number,(fw,bw) in CASES.items():
    if WARM and str(number)!=WARM[0]: continue
    case=sw.CASES[number]; x=sw.Inputs.random(case)
    for part,variants in ((0,fw),(1,bw)):
        calls={}; want=None
        if WARM and str(part)!=WARM[1]: continue
        for name,s in variants.items():
            if WARM and name not in WARM[2:]: continue
            setup(**s)
            try:
                if number in (1,4,6) and (not WARM or part): sw.check(case,x)
                run=sw.ours(case,x)[part]
                got=run(); got=[t for t in (got if part==0 else (got.q,got.k,got.v,*got.bias))]
                if want is None: want=got
                gap=max(float((a.float()-b.float()).abs().max()/b.float().abs().max()) for a,b in zip(got,want))
                if not gap<2e-2: print(case.name,case.side,part,name,"WRONG",gap,flush=True); continue
                calls[name]=sw.graph(run)
            except Exception as err: print(number,part,name,type(err).__name__,str(err)[:200],flush=True)
        if WARM: continue
        if len(calls)<2: continue
        t=compare_paired(calls,5,"cuda",torch.Generator(),warmup=2)
        for ms,n in sorted((t.times[n].median*1e3,n) for n in calls):
            print(case.name,case.side,("forward","backward")[part],f"{ms:.4f}",n,flush=True); best.setdefault((number,part),{})[n]=ms
    print(f"{time.time()-t0:.0f}s",flush=True)
if not WARM:
    f=min(pick(FW,*[n for n in FW if n!="tiles" and n in best[1,0] and n in best[0,0]]),key=lambda n:best[1,0][n]/best[1,0]["tiles"]+best[0,0][n]/best[0,0]["tiles"])
    b=min([n for n in BW if n!="tiles" and n in best[1,1] and n in best[0,1]],key=lambda n:best[1,1][n]/best[1,1]["tiles"]+best[0,1][n]/best[0,1]["tiles"])
    t=dict(BW[b])|FW[f]
    g=lambda k,*n: min(best.get(k,{}).get(m,9) for m in n)
    wide="fresh168" if "maxnreg" in FW[f]["forward"] else "ahead"; wideb="ahead168" if "168" in b else "ahead"
    t["direct"]=256 if g((2,0),wide)+g((2,1),wideb)<g((2,0),"tiles")+g((2,1),"tiles") else 128
    if g((4,0),"ahead")<g((4,0),"tiles"): t["bias forward"]=1
    if g((6,1),"direct")<g((6,1),"tiles"): t["rows"]=64
    print("CHOSEN",f,b,t,flush=True); json.dump(t,open(OUT+"/chosen.json","w"))
